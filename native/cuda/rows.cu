#include <algorithm>

#include "rows.cuh"
#include "with_type.h"

namespace innerkv::gpu {

namespace {

unsigned blocks_of(std::int64_t items, int each) {
  return static_cast<unsigned>(std::max<std::int64_t>(1, (items + each - 1) / each));
}

template <RowSource kSource>
cudaError_t prepare_form(RowForm form, const RowsArgs& args, dim3 grid, cudaStream_t stream) {
  const dim3 block(kRowThreads);
  if (form == RowForm::kFloats)
    return launch(prepare_rows_kernel<kSource, RowForm::kFloats>, grid, block, 0, stream, args);
  if (form == RowForm::kBytes)
    return launch(prepare_rows_kernel<kSource, RowForm::kBytes>, grid, block, 0, stream, args);
  return launch(prepare_rows_kernel<kSource, RowForm::kHalves>, grid, block, 0, stream, args);
}

}  // namespace

cudaError_t arrange(const MatrixArgs& matrix, const std::uint8_t* blocks, int first, int count,
                    cudaStream_t stream) {
  if (count < 1) return cudaSuccess;
  const TensorTypeInfo& info = info_of(matrix.type);
  ArrangeArgs args{};
  args.matrix = matrix;
  args.planes = planes_of(matrix.type);
  args.blocks = reinterpret_cast<const std::uint16_t*>(blocks);
  args.first = first;
  args.count = count;
  args.block_words = info.bytes / 2;
  args.row_words = matrix.columns / info.elements * args.block_words;
  const std::int64_t words = std::int64_t{args.row_words} * count;
  return launch(arrange_blocks, dim3(std::min(blocks_of(words, 4 * 256), 65536u)), dim3(256), 0, stream,
                args);
}

cudaError_t embed(const MatrixArgs& matrix, const int* tokens, int count, float* out, cudaStream_t stream) {
  if (count < 1) return cudaErrorInvalidValue;
  return with_tensor_type(matrix.type, [&](auto type) {
    const int units = matrix.columns / Weights<type.value>::kColumns + 1;
    return launch(embed_rows<type.value>, dim3(static_cast<unsigned>(count), blocks_of(units, kRowThreads)),
                  dim3(kRowThreads), 0, stream, matrix, tokens, out);
  });
}

cudaError_t prepare_rows(RowSource source, RowForm form, const RowsArgs& args, cudaStream_t stream) {
  if (args.rows < 1) return cudaErrorInvalidValue;
  if (form == RowForm::kBytes ? args.columns % 32 != 0 : args.out.stride % 32 != 0)
    return cudaErrorInvalidValue;
  // Halves need the whole row's largest number: one block, which then writes the row alone.
  const unsigned across = form == RowForm::kHalves ? 1 : blocks_of(args.columns, 4 * kRowThreads);
  const dim3 grid(static_cast<unsigned>(args.rows), across);
  if (source == RowSource::kPlain) return prepare_form<RowSource::kPlain>(form, args, grid, stream);
  if (source == RowSource::kHeads) return prepare_form<RowSource::kHeads>(form, args, grid, stream);
  return prepare_form<RowSource::kGated>(form, args, grid, stream);
}

cudaError_t prepare_heads(const HeadsArgs& args, cudaStream_t stream) {
  if (args.rows < 1) return cudaErrorInvalidValue;
  const int heads = args.query_heads + 2 * args.kv_heads;
  return launch(prepare_heads_kernel, dim3(static_cast<unsigned>(args.rows), blocks_of(heads, kHeadWarps)),
                dim3(32 * kHeadWarps), 0, stream, args);
}

cudaError_t score_rows(const float* logits, const int* targets, int rows, int vocabulary, float* nll,
                       cudaStream_t stream) {
  if (rows < 1 || vocabulary < 1) return cudaErrorInvalidValue;
  return launch(score_rows_kernel, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads), 0, stream, logits,
                targets, vocabulary, nll);
}

}  // namespace innerkv::gpu
