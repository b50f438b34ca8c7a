// The reader of saved sequences. Input: one byte that picks the cache, one of flags, then the file. With flag
// 1 all checksums are made right first, so that mutations reach what they protect; flag 2 feeds small pieces.
// What is accepted must save to the same file, must be usable, and all memory must come back.
#include "../support.h"
#include "format/checksum.h"
#include "fuzz.h"

namespace innerkv::test {
namespace {

struct World {
  Family family;
  std::shared_ptr<Cache> cache;
  Tokens tokens;
};

const std::vector<World>& worlds() {
  static const auto all = [] {
    std::vector<World> made;
    std::vector<Family> list = families();
    list.push_back({"two layers", config_of({innerq(), calibrated()})});
    for (Family& family : list) {
      family.config.kv_heads = family.config.layers == 1 ? 1 : 2;
      family.config.budget_bytes = std::size_t{512} << 10;
      if (family.config.kv_heads == 1)
        for (LayerScheme& scheme : family.config.schemes)
          if (!scheme.basis.empty()) scheme.basis.resize(1);
      made.push_back({family, cache_of(family.config), tokens_of(family.config, 200, 1)});
    }
    return made;
  }();
  return all;
}

/// Makes the checksums of a file right, as far as its own lengths lead.
void seal(Bytes& file) {
  const auto put = [&](std::size_t begin, std::size_t end) {
    if (end > file.size() || file.size() - end < 4) return false;
    const std::uint32_t crc = crc32c(file.data() + begin, end - begin);
    std::memcpy(file.data() + end, &crc, 4);
    return true;
  };
  if (file.size() < 16) return;
  std::uint32_t head;
  std::memcpy(&head, file.data() + 12, 4);
  std::size_t at_byte = std::size_t{16} + head;
  if (!put(0, at_byte)) return;
  at_byte += 4;
  while (file.size() - at_byte >= 16) {
    std::uint64_t body;
    std::memcpy(&body, file.data() + at_byte + 8, 8);
    if (std::memcmp(file.data() + at_byte, "INKVEND1", 8) == 0) {
      put(at_byte, at_byte + 12);
      return;
    }
    if (body > file.size() || !put(at_byte, at_byte + 16 + body)) return;
    at_byte += 20 + body;
  }
}

void use(Sequence& sequence, const Tokens& tokens) {
  const int layers = sequence.cache().config().layers;
  for (int layer = 0; layer < layers; ++layer) {
    const int n = sequence.tokens(layer);
    if (n > 1000) return;  // long, not wrong: a matter of time only
    read_back(sequence, layer, 0);
    if (n > 0) attended(sequence, layer);
    error_of([&] { append(sequence, tokens, 0, 45, layer); });
    if (sequence.tokens(layer) > 0) attended(sequence, layer);
  }
  sequence.fork()->truncate(std::max(0, sequence.tokens(0) - 50));
  sequence.truncate(20);
  if (sequence.tokens(0) > 0) attended(sequence);
}

}  // namespace

std::vector<Bytes> fuzz_seeds() {
  std::vector<Bytes> seeds;
  for (std::size_t i = 0; i < worlds().size(); ++i)
    for (const int n : {3, 50, 150}) {
      const World& world = worlds()[i];
      const auto sequence = filled(world.cache, world.tokens, n);
      if (world.family.editable() && n == 150) {
        const int positions[] = {20, 21, 90};
        sequence->remove(0, 0, positions);
        sequence->truncate(140);
      }
      for (const int flags : {0, 1, 3}) {
        if (flags == 3 && n == 150) continue;
        Bytes seed = saved(*sequence);
        seed.insert(seed.begin(), {static_cast<std::uint8_t>(i), static_cast<std::uint8_t>(flags)});
        seeds.push_back(std::move(seed));
      }
    }
  return seeds;
}

}  // namespace innerkv::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace innerkv;
  using namespace innerkv::test;
  if (size < 2) return 0;
  const World& world = worlds()[data[0] % worlds().size()];
  const std::size_t piece = data[1] & 2 ? 1 + data[1] / 4 : SIZE_MAX;
  Bytes file(data + 2, data + size);
  if (data[1] & 1) seal(file);
  try {
    const auto sequence = loaded(world.cache, file, piece);
    always(world.cache->pool().used_bytes() == bytes_held(*sequence),
           "the pool holds what the sequence holds");
    Bytes again;
    error_of([&] { again = saved(*sequence); });  // the writer's fork may not fit the budget
    always(again.empty() || again == file, "an accepted file is the file of what it holds");
    use(*sequence, world.tokens);
  } catch (const Error& error) {
    always(error.code() != ErrorCode::kInternal, "no error is internal");
  }
  always(world.cache->pool().used_bytes() == 0, "all memory comes back");
  return 0;
}
