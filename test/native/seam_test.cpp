// The core treats device memory as a GPU's: it never reads or writes it except through the backend. Here
// device memory has no access rights while the core runs, so that one stray access ends the program with a
// report.
#include <sys/mman.h>

#include <map>

#include "device_tensors.h"

namespace innerkv::test {
namespace {

/// The CPU backend with memory that only its own calls may touch.
class SealedBackend final : public Backend {
 public:
  ~SealedBackend() override { CHECK(regions_.empty()); }
  void* allocate_memory(std::size_t bytes) override {
    void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Error(ErrorCode::kOutOfMemory, "refused");
    regions_[memory] = bytes;
    return memory;
  }
  void free_memory(void* memory, std::size_t bytes) noexcept override {
    regions_.erase(memory);
    munmap(memory, bytes);
  }
  void clear_memory(void* memory, std::size_t bytes) noexcept override {
    const Opened opened(*this);
    cpu_.clear_memory(memory, bytes);
  }
  void copy_memory(void* to, const void* from, std::size_t bytes) noexcept override {
    const Opened opened(*this);
    cpu_.copy_memory(to, from, bytes);
  }
  void stage(std::span<Staging> numbers) override {
    int place = -1;
    for (Staging& one : numbers)
      one.ready = static_cast<const std::uint16_t*>(keep(place--, one.from, 2 * one.count));
  }
  void take(std::span<Intake> tensors) override {
    {
      const Opened opened(*this);
      cpu_.take(tensors);
    }
    int place = 0;
    for (Intake& tensor : tensors)
      if (tensor.ready != tensor.from)
        tensor.ready = keep(place++, tensor.ready, dtype_bytes(tensor.as) * tensor.count);
  }
  std::string objection(const void*, std::size_t) override { return ""; }
  void copy_rows(std::span<const RowCopy> copies, int row) noexcept override {
    const Opened opened(*this);
    cpu_.copy_rows(copies, row);
  }
  void quantise(const CacheConfig& config, std::span<const QuantiseJob> jobs,
                const RotationTable& rotations) override {
    const Opened opened(*this);
    cpu_.quantise(config, jobs, rotations);
  }
  bool attend(const CacheConfig& config, std::span<const AttendRequest> requests,
              const RotationTable& rotations, const std::atomic<bool>* aborted) override {
    const Opened opened(*this);
    return cpu_.attend(config, requests, rotations, aborted);
  }
  void attend_dense(const DenseRequest& request) override { cpu_.attend_dense(request); }

  /// Everything may be touched while one of these lives.
  class Opened {
   public:
    explicit Opened(SealedBackend& backend) : backend_(backend) { backend_.protect(PROT_READ | PROT_WRITE); }
    ~Opened() { backend_.protect(PROT_NONE); }
    Opened(const Opened&) = delete;

   private:
    SealedBackend& backend_;
  };
  void release_staging() {
    for (const auto& [place, staged] : staged_) free_memory(staged.memory, staged.bytes);
    staged_.clear();
  }

 private:
  struct Staged {
    void* memory = nullptr;
    std::size_t bytes = 0;
  };
  const void* keep(int place, const void* from, std::size_t bytes) {
    Staged& staged = staged_[place];
    if (staged.bytes < bytes) {
      if (staged.memory) free_memory(staged.memory, staged.bytes);
      staged = {allocate_memory(bytes), bytes};
    }
    copy_memory(staged.memory, from, bytes);
    return staged.memory;
  }
  void protect(int rights) {
    for (const auto& [memory, bytes] : regions_) mprotect(memory, bytes, rights);
  }
  CpuBackend cpu_{1, nullptr};
  std::map<void*, std::size_t> regions_;
  std::map<int, Staged> staged_;
};

/// A life with every operation; what it leaves behind as bytes.
template <class Open>
std::vector<Bytes> live(const std::shared_ptr<Cache>& cache, const Family& family, const Tokens& tokens,
                        Open open) {
  std::vector<Bytes> seen;
  const auto record = [&](const Sequence& sequence) {
    const Decoded decoded = read_back(sequence, 0, 1);
    const std::vector<float> out = attended(sequence);
    Recorder recorder;
    recorder.put(decoded.k.data(), sizeof(float) * decoded.k.size());
    recorder.put(decoded.v.data(), sizeof(float) * decoded.v.size());
    recorder.put(out.data(), sizeof(float) * out.size());
    seen.push_back(recorder.bytes);
    seen.push_back(saved(sequence));
    [[maybe_unused]] const auto opened = open();
    seen.push_back(contents(sequence));
  };
  auto sequence = filled(cache, tokens, 150);
  for (int t = 150; t < 215; ++t) append(*sequence, tokens, t, 1);
  record(*sequence);
  auto fork = sequence->fork();
  if (family.editable()) {
    sequence->replace(0, 20, tokens.k.data(), tokens.v.data());
    const int positions[] = {21, 50};
    sequence->remove(0, 1, positions);
  }
  sequence->truncate(133);
  append(*sequence, tokens, 100, 60);
  record(*sequence);
  record(*fork);
  const auto again = loaded(cache, saved(*sequence), 4096);
  append(*again, tokens, 0, 40);
  record(*again);
  return seen;
}

TEST("the core touches device memory only through the backend, and no result depends on it") {
  for (const Family& family : families()) {
    const Tokens tokens = tokens_of(family.config, 215, 4);
    const auto plain = cache_of(family.config);
    const auto expected = live(plain, family, tokens, [] { return 0; });
    const auto backend = std::make_shared<SealedBackend>();
    {
      const auto cache = std::make_shared<Cache>(backend, family.config);
      CHECK_WITH(live(cache, family, tokens,
                      [&] { return std::make_unique<SealedBackend::Opened>(*backend); }) == expected,
                 family.name);
    }
    backend->release_staging();
  }
}

TEST("tensors on the device are taken in by the backend, and give what arrays give") {
  for (const Family& family : families())
    for (const Dtype dtype : kDtypes) {
      const auto backend = std::make_shared<SealedBackend>();
      check_same_as_arrays(backend, family, dtype);
      backend->release_staging();
    }
}

TEST("what is not finite on the device is refused by name, and nothing has changed") {
  for (const Dtype dtype : kDtypes) {
    const auto backend = std::make_shared<SealedBackend>();
    check_not_finite(backend, families()[0], dtype);
    backend->release_staging();
  }
}

}  // namespace
}  // namespace innerkv::test

int main(int argc, char** argv) { return check::run("seam", argc, argv); }
