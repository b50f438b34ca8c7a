// Stored tokens back to numbers, on the host: for reading a sequence back and for values that return to a
// window.
#pragma once

#include "backend.h"

namespace innerkv {

/// What a page holds, in the space of the input: k, v [128][D] float32 (host), zero from slot `k_slots`
/// (`v_slots`) on. One rounding per operation, in the order of docs/format.md backwards.
struct DecodeJob {
  const LayerScheme* scheme;
  const Basis* basis;
  const Page* page;
  int page_index, sink, k_slots, v_slots;
};
void decode_page(Backend& backend, int head_dim, const DecodeJob& job, const RotationTable& rotations,
                 float* k, float* v);

}  // namespace innerkv
