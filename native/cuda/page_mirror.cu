#include <algorithm>

#include "../core/error.h"
#include "gpu_backend.h"
#include "mirrors.h"
#include "page_mirror.cuh"
#include "page_mirror.h"

namespace innerkv::gpu {

// ---- blocks ----

BlockPool::~BlockPool() {
  for (std::uint8_t* slab : slabs_) device::release(slab);
}

int BlockPool::size_of(std::size_t bytes) {
  int log = kLeastLog;
  while (std::size_t{1} << log < bytes) ++log;
  return log;
}

std::uint8_t* BlockPool::take(std::size_t* bytes) {
  const std::lock_guard lock(mutex_);
  const int log = size_of(*bytes);
  std::vector<std::uint8_t*>& idle = idle_[log];
  *bytes = std::size_t{1} << log;
  if (idle.empty()) {
    const std::size_t slab = std::max(*bytes, std::size_t{1} << kSlabLog), count = slab / *bytes;
    idle.reserve(blocks_[log] + count);  // so that giving back takes no memory
    slabs_.reserve(slabs_.size() + 1);
    slabs_.push_back(static_cast<std::uint8_t*>(device::allocate(slab)));
    blocks_[log] += count;
    for (std::size_t i = count; i-- > 0;) idle.push_back(slabs_.back() + i * *bytes);
  }
  std::uint8_t* block = idle.back();
  idle.pop_back();
  return block;
}

void BlockPool::give_back(std::uint8_t* block, std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  idle_[size_of(bytes)].push_back(block);
}

// ---- tables ----

PageMirror::PageMirror(std::shared_ptr<BlockPool> of, int entries, bool compact) : pool(std::move(of)) {
  const std::size_t entry = sizeof(PageArgs) + (compact ? sizeof(*extents) * kExtents : 0);
  bytes = entry * at(entries);
  block = pool->take(&bytes);
  capacity = static_cast<int>(bytes / entry);
  if (compact) extents = reinterpret_cast<const std::uint16_t**>(pages() + capacity);
}

namespace {

PageArgs page_args(const PageLayout& layout, const Page* page, const std::uint16_t** extents) {
  PageArgs args{};
  if (!page) return args;
  args.k = page->bytes.data() + layout.k_at();
  args.v = page->bytes.data() + layout.v_at();
  std::copy(std::begin(page->removed), std::end(page->removed), args.removed);
  args.k_zeros = extents;
  args.v_zeros = extents ? extents + kMaxExtents : nullptr;
  return args;
}

ExtentPatch extent_patch(const Page& page, const std::uint16_t** to) {
  ExtentPatch patch{};
  patch.to = to;
  const auto put = [&](const std::vector<Slot>& from, int first) {
    for (const Slot& slot : from)
      patch.extents[first++] = reinterpret_cast<const std::uint16_t*>(slot.data());
  };
  put(page.k_zeros, 0);
  put(page.v_zeros, kMaxExtents);
  return patch;
}

}  // namespace

void GpuBackend::update_tables(const PageLayout& layout, bool compact,
                               std::span<const AttendRequest> requests) {
  std::vector<PagePatch> pages;
  std::vector<ExtentPatch> extents;
  std::vector<const PageTable*> told;
  try {
    for (const AttendRequest& request : requests)
      for (const HeadView& view : request.heads) {
        const PageTable& table = *view.table;
        const int entries = static_cast<int>(table.size());
        const auto* known = static_cast<const PageMirror*>(table.mirror.get());
        const bool moves = entries > (known ? known->capacity : 0);
        if (entries == 0 || (!moves && !table.all_stale() && table.stale().empty())) continue;
        if (moves) table.mirror = std::make_shared<PageMirror>(blocks_, entries + entries / 2, compact);
        const auto& mirror = *static_cast<const PageMirror*>(table.mirror.get());
        const auto tell = [&](int i) {
          const Page* page = table[at(i)].get();
          const std::uint16_t** own =
              mirror.extents ? mirror.extents + std::ptrdiff_t{i} * PageMirror::kExtents : nullptr;
          pages.push_back({mirror.pages() + i, page_args(layout, page, own)});
          if (own && page) extents.push_back(extent_patch(*page, own));
        };
        told.push_back(&table);
        if (moves || table.all_stale())
          for (int i = 0; i < entries; ++i) tell(i);
        else
          for (const int i : table.stale()) tell(i);
        table.told();  // so that a second request for the same sequence has nothing to tell
      }
    if (pages.empty()) return;
    Upload upload(pages_, Upload::room<PagePatch>(pages.size()) + Upload::room<ExtentPatch>(extents.size()));
    PagePatch* page_patches;
    ExtentPatch* extent_patches;
    const PagePatch* pages_there = upload.add(pages.size(), &page_patches);
    const ExtentPatch* extents_there = upload.add(extents.size(), &extent_patches);
    std::copy(pages.begin(), pages.end(), page_patches);
    std::copy(extents.begin(), extents.end(), extent_patches);
    upload.flush();
    const auto patch = [](auto kernel, const auto* there, std::size_t count) {
      const int patches = static_cast<int>(count);
      if (count > 0)
        run("page tables", kernel, dim3(dim(ceil_div(patches, kPatchThreads))), kPatchThreads, 0, there,
            patches);
    };
    patch(patch_pages, pages_there, pages.size());
    patch(patch_extents, extents_there, extents.size());
  } catch (...) {
    for (const PageTable* table : told) table->mirror.reset();  // nobody knows what it shows
    throw;
  }
}

}  // namespace innerkv::gpu
