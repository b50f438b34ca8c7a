// One sequence as a stream of bytes, and back. Chunked, versioned, every byte under a checksum.
//
//   "INKVSEQ1"  u32 version  u32 header bytes  header  u32 crc32c of all before
//   per layer, per KV head:  u32 layer  u32 head  u64 payload bytes  payload  u32 crc32c of the chunk
//   "INKVEND1"  u32 number of chunks  u32 crc32c of the end mark
// Numbers are little endian. A reader accepts nothing it does not know and builds the sequence aside, so that
// a bad file changes nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sequence.h"

namespace innerkv {

inline constexpr std::uint32_t kSaveVersion = 1;

/// Produces the stream piece by piece: the head, one piece per (layer, KV head), the end.
class SequenceWriter {
 public:
  /// Holds a fork, so the sequence may go on being used.
  explicit SequenceWriter(const Sequence& sequence) : sequence_(sequence.fork()) {}
  /// The next piece; empty when all has been written.
  std::vector<std::uint8_t> next();
  int pieces() const;

 private:
  std::vector<std::uint8_t> header() const;
  std::vector<std::uint8_t> chunk(int layer, int head) const;
  std::unique_ptr<Sequence> sequence_;
  int piece_ = 0;
};

/// Takes the stream in pieces of any size and buffers one (layer, KV head) of it at most. Throws
/// Error{kCorrupt}, {kBasisMismatch}, {kInvalidArgument} (a file of another cache) or {kOutOfMemory}; after
/// an error the reader holds nothing and accepts nothing.
class SequenceReader {
 public:
  explicit SequenceReader(std::shared_ptr<Cache> cache);
  void feed(const std::uint8_t* data, std::size_t size);
  /// The sequence, once the end mark has been read.
  std::unique_ptr<Sequence> finish();

 private:
  bool step();
  bool read_header();
  bool read_chunk();
  bool read_end();
  void parse_layers(const std::uint8_t* data, std::size_t size);
  void parse_chunk(int layer, int head, const std::uint8_t* data, std::size_t size);
  struct Limits {
    std::size_t honest, affordable;
  };
  Limits chunk_limits(int layer) const;

  std::shared_ptr<Cache> cache_;
  std::unique_ptr<Sequence> sequence_;
  std::vector<std::vector<Basis>> online_;  // [layers]
  std::vector<std::uint8_t> pending_;
  std::size_t used_ = 0;
  enum class Stage { kHeader, kChunks, kEnd, kDone, kFailed } stage_ = Stage::kHeader;
  int chunk_ = 0;
};

}  // namespace innerkv
