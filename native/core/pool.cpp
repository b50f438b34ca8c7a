#include "pool.h"

#include <algorithm>
#include <string>

#include "backend.h"
#include "error.h"

namespace innerkv {

struct Slot::Slab {
  Pool* pool;
  Pool::SizeClass* cls;
  std::uint8_t* memory;
  int slots;
  std::vector<std::uint8_t*> free;  // capacity for all slots: giving back never allocates
  int position = -1;                // in cls->open, -1 when full
};

struct Pool::SizeClass {
  std::size_t bytes;
  std::vector<std::unique_ptr<Slot::Slab>> slabs;
  std::vector<Slot::Slab*> open;  // slabs with a free slot
};

namespace {
constexpr std::size_t kSlabBytes = std::size_t{1} << 20;
constexpr std::size_t kSlabsInBudget = 64;  // a small budget gets small slabs, so that no class hogs it
}  // namespace

void Slot::reset() {
  if (data_) slab_->pool->give(slab_, data_);
  slab_ = nullptr;
  data_ = nullptr;
}

Pool::Pool(Backend& backend, std::size_t budget_bytes) : backend_(backend), budget_(budget_bytes) {}

Pool::~Pool() {
  for (auto& [bytes, cls] : classes_)
    for (auto& slab : cls->slabs)
      backend_.free_memory(slab->memory, bytes * static_cast<std::size_t>(slab->slots));
}

Slot::Slab* Pool::grow(SizeClass& cls) {
  const std::size_t wanted =
      std::max(std::size_t{1}, std::min(kSlabBytes, budget_ / kSlabsInBudget) / cls.bytes);
  if (budget_ - reserved_ < cls.bytes) release_idle_slabs(cls.bytes);
  const std::size_t slots = std::min(wanted, (budget_ - reserved_) / cls.bytes);
  if (slots == 0)
    throw Error(ErrorCode::kOutOfMemory,
                "The cache's memory budget of " + std::to_string(budget_) + " bytes is used up: " +
                    std::to_string(used_) + " bytes are held, " + std::to_string(cls.bytes) +
                    " more are needed. Dispose or truncate sequences, or create the cache with more memory.");
  auto slab = std::make_unique<Slot::Slab>();
  slab->free.reserve(slots);
  cls.slabs.reserve(cls.slabs.size() + 1);
  cls.open.reserve(cls.slabs.size() + 1);
  slab->pool = this;
  slab->cls = &cls;
  slab->slots = static_cast<int>(slots);
  slab->memory = static_cast<std::uint8_t*>(backend_.allocate_memory(cls.bytes * slots));
  for (std::size_t i = slots; i-- > 0;) slab->free.push_back(slab->memory + i * cls.bytes);
  slab->position = static_cast<int>(cls.open.size());
  reserved_ += cls.bytes * slots;
  cls.open.push_back(slab.get());
  cls.slabs.push_back(std::move(slab));
  return cls.slabs.back().get();
}

/// Returns whole idle slabs to the backend until `wanted` bytes fit into the budget.
void Pool::release_idle_slabs(std::size_t wanted) {
  for (auto& [bytes, cls] : classes_)
    for (std::size_t i = 0; i < cls->slabs.size() && budget_ - reserved_ < wanted;) {
      Slot::Slab& slab = *cls->slabs[i];
      if (static_cast<int>(slab.free.size()) < slab.slots) {
        ++i;
        continue;
      }
      const std::size_t held = bytes * static_cast<std::size_t>(slab.slots);
      backend_.free_memory(slab.memory, held);
      reserved_ -= held;
      cls->open.back()->position = slab.position;
      cls->open[static_cast<std::size_t>(slab.position)] = cls->open.back();
      cls->open.pop_back();
      std::swap(cls->slabs[i], cls->slabs.back());
      cls->slabs.pop_back();
    }
}

Slot Pool::take(std::size_t bytes) {
  auto& cls = classes_[bytes];
  if (!cls) cls = std::make_unique<SizeClass>(SizeClass{bytes, {}, {}});
  Slot::Slab* slab = cls->open.empty() ? grow(*cls) : cls->open.back();
  std::uint8_t* data = slab->free.back();
  backend_.clear_memory(data, bytes);
  slab->free.pop_back();
  if (slab->free.empty()) {
    cls->open.pop_back();
    slab->position = -1;
  }
  used_ += bytes;
  return Slot(slab, data);
}

void Pool::give(Slot::Slab* slab, std::uint8_t* data) {
  slab->free.push_back(data);
  if (slab->position < 0) {
    slab->position = static_cast<int>(slab->cls->open.size());
    slab->cls->open.push_back(slab);  // within the capacity reserved by grow()
  }
  used_ -= slab->cls->bytes;
}

}  // namespace innerkv
