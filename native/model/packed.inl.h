// Products of quantised weights with many vectors of 8-bit activations, included once by each isa_*.cpp after
// kernels.inl.h. 32 rows of weights are laid out so that a register holds four columns of kLanes rows: then a
// sum over columns needs no additions across lanes, and the layout serves all vectors.

/// How the codes of a type are split: columns that share a scale, and the largest magnitude of a code.
template <TensorType kType>
struct Packing {
  using B = Block<kType>;
  static constexpr int kSpan = B::kHalves ? 16 : 32, kQuads = kSpan / 4;
  static constexpr bool kBiased = B::kSigned && !kSignedCodes;  // stored as code + 128
  static constexpr bool kOffsets = !B::kSigned || kBiased;
};

template <TensorType kType>
void pack_as(const PackArgs& args) {
  using P = Packing<kType>;
  for (int r = 0; r < kPanelRows; ++r) {
    if (r >= args.rows) {  // no rows: zeros
      for (int first = 0; first < args.columns; first += 4)
        __builtin_memset(args.to.codes + (first / 4 * kPanelRows + r) * 4, 0, 4);
      for (int g = 0; g < args.columns / P::kSpan; ++g)
        args.to.scales[g * kPanelRows + r] = args.to.offsets[g * kPanelRows + r] = 0;
      continue;
    }
    for_parts<kType>(args.weights + static_cast<std::size_t>(r) * args.row_bytes, args.columns,
                     [&](const Codes& part, int first) {
                       std::uint32_t quads[8];
                       const Bytes codes = P::kBiased ? part.codes ^ 128 : part.codes;
                       __builtin_memcpy(quads, &codes, 32);
                       std::uint8_t* to = args.to.codes + (first / 4 * kPanelRows + r) * 4;
                       for (int q = 0; q < 8; ++q) __builtin_memcpy(to + q * kPanelRows * 4, quads + q, 4);
                       for (int h = 0; h < 32 / P::kSpan; ++h) {
                         const int at = (first / P::kSpan + h) * kPanelRows + r;
                         args.to.scales[at] = part.scale[h];
                         args.to.offsets[at] = P::kBiased ? -128 * part.scale[h] : part.offset[h];
                       }
                     });
  }
}

void pack(const PackArgs& args) {
  with_type(args.type, [&](auto known) { pack_as<known.value>(args); });
}

/// kTiles x kLanes rows and kVectors vectors.
template <TensorType kType, int kTiles, int kVectors>
void packed_tile(const PackedDotArgs& args, int row, int vector) {
  using P = Packing<kType>;
  const std::ptrdiff_t columns = args.columns, groups = columns / 32, halves = columns / 16;
  const std::int8_t* x = args.x.codes + vector * columns;
  const float *steps = args.x.steps + vector * groups, *totals = args.x.totals + vector * halves;
  Vec sum[kVectors][kTiles] = {};
  for (int g = 0; g < args.columns / P::kSpan; ++g) {
    Ints dots[kVectors][kTiles] = {};
    dot_group<kType, P::kQuads>(args.panel.codes + (std::ptrdiff_t{g} * P::kSpan * kPanelRows + 4 * row),
                                x + std::ptrdiff_t{g} * P::kSpan, columns, dots);
    Vec scale[kTiles], offset[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      scale[i] = load_as<Vec>(args.panel.scales + g * kPanelRows + row + i * kLanes);
      offset[i] = load_as<Vec>(args.panel.offsets + g * kPanelRows + row + i * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) {
      const float step = steps[v * groups + g * P::kSpan / 32];
      const float total = P::kSpan == 16 ? totals[v * halves + g]
                                         : totals[v * halves + 2 * g] + totals[v * halves + 2 * g + 1];
      for (int i = 0; i < kTiles; ++i) {
        sum[v][i] = fma(__builtin_convertvector(dots[v][i], Vec), scale[i] * step, sum[v][i]);
        if constexpr (P::kOffsets) sum[v][i] = fma(offset[i], Vec{} + total, sum[v][i]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kTiles; ++i) {
      const int first = row + i * kLanes, count = args.rows - first;
      float* to = args.out + (vector + v) * args.out_stride + first;
      if (count >= kLanes)
        __builtin_memcpy(to, &sum[v][i], sizeof(Vec));
      else
        for (int l = 0; l < count; ++l) to[l] = sum[v][i][l];
    }
}

template <TensorType kType, int kVectors>
void packed_rows(const PackedDotArgs& args, int vector) {
  for (int row = 0; row < args.rows; row += kPackedTiles * kLanes)
    packed_tile<kType, kPackedTiles, kVectors>(args, row, vector);
}

void packed_dot(const PackedDotArgs& args) {
  with_type(args.type, [&](auto known) {
    int vector = 0;
    for (; vector + kPackedVectors <= args.vectors; vector += kPackedVectors)
      packed_rows<known.value, kPackedVectors>(args, vector);
    for (; vector + 2 <= args.vectors; vector += 2) packed_rows<known.value, 2>(args, vector);
    for (; vector < args.vectors; ++vector) packed_rows<known.value, 1>(args, vector);
  });
}

constexpr ModelKernels table(const char* isa) {
  return {isa, dequantise, quantise, integer_dot, pack, packed_dot, float_dot, swiglu, sum_exp};
}
