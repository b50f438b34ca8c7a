// page tables: entries that changed, from the upload of a call to where attention finds them.
//
// - Maths: none; entries are copied as they are.
// - Work: a thread per entry, a block of 64.
// - Lanes: neighbouring lanes have neighbouring patches, mostly of neighbouring entries.
// - Memory: reads 56 bytes an entry, writes 48; where zero points are compact 136 and 128 more. None in most
// steps.
// - Precision: none.
// - Limits: no two patches of a launch are of one entry.
#pragma once

#include "page_mirror.h"
#include "portable.h"

namespace innerkv::gpu {

inline constexpr int kPatchThreads = 64;

/// Entries of page tables: a thread each.
INNERKV_KERNEL(kPatchThreads) void patch_pages(const PagePatch* patches, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) *patches[i].to = patches[i].page;
}
INNERKV_KERNEL(kPatchThreads) void patch_extents(const ExtentPatch* patches, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  for (int e = 0; e < PageMirror::kExtents; ++e) patches[i].to[e] = patches[i].extents[e];
}

}  // namespace innerkv::gpu
