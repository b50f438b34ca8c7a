#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "../core/error.h"
#include "device.h"
#include "factory.h"
#include "gpu_backend.h"
#include "gpu_model.h"

namespace innerkv {

namespace gpu::device {
namespace {

std::atomic<cudaError_t> noted{cudaSuccess};

std::string text_of(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

}  // namespace

cudaStream_t stream() {
  static cudaStream_t made = [] {
    cudaStream_t fresh = nullptr;
    check(cudaStreamCreateWithFlags(&fresh, cudaStreamNonBlocking), "Opening a stream");
    return fresh;
  }();
  return made;
}

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaSuccess) return memory;
  cudaGetLastError();  // this one is reported here; later calls must not trip over it
  throw Error(error == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal,
              "The GPU refused " + std::to_string(bytes) + " bytes: " + text_of(error) + ".");
}

bool owns(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

void* allocate_pinned(std::size_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMallocHost(&memory, bytes);
  if (error == cudaSuccess) return memory;
  cudaGetLastError();
  throw Error(
      error == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal,
      "The machine refused " + std::to_string(bytes) + " bytes of pinned memory: " + text_of(error) + ".");
}

void release_pinned(void* memory) noexcept {
  if (memory) note(cudaFreeHost(memory));
}

namespace raw {

void release(void* memory) noexcept {
  if (memory) note(cudaFree(memory));
}

void clear(void* memory, std::size_t bytes) noexcept { note(cudaMemsetAsync(memory, 0, bytes, stream())); }

void copy(void* to, const void* from, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()));
  if (!owns(to)) note(cudaStreamSynchronize(stream()));
}

void copy_later(void* to, const void* from, std::size_t bytes) noexcept {
  if (bytes > 0) note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()));
}

void forget(void* event) noexcept {
  if (event) note(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}

void set(void*& event) noexcept {
  if (!event) {
    cudaEvent_t made = nullptr;
    if (const cudaError_t error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
        error != cudaSuccess) {
      note(error);
      return synchronize();  // then there is nothing to wait for
    }
    event = made;
  }
  note(cudaEventRecord(static_cast<cudaEvent_t>(event), stream()));
}

void wait(void* event) noexcept {
  if (event) note(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
}

void synchronize() noexcept { note(cudaStreamSynchronize(stream())); }

namespace {

void order(cudaStream_t first, cudaStream_t second) noexcept {
  cudaEvent_t event = nullptr;  // a fresh one, because threads may do this at once
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error == cudaSuccess) error = cudaEventRecord(event, first);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(second, event, 0);
  if (event) cudaEventDestroy(event);  // the wait keeps what it needs
  note(error);
}

}  // namespace

void follow(cudaStream_t other) noexcept { order(other, stream()); }
void lead(cudaStream_t other) noexcept { order(stream(), other); }

}  // namespace raw

namespace {

class CudaGraph final : public Graph {
 public:
  ~CudaGraph() override {
    if (ready_) note(cudaGraphExecDestroy(ready_));
    if (graph_) note(cudaGraphDestroy(graph_));
  }
  cudaError_t make(const PinnedCopy& copy, std::span<const KernelNode> nodes, const std::byte* parameters) {
    cudaError_t error = cudaGraphCreate(&graph_, 0);
    cudaGraphNode_t last = nullptr;
    if (copy.bytes > 0 && error == cudaSuccess) {
      error = cudaGraphAddMemcpyNode1D(&copy_, graph_, nullptr, 0, copy.to, copy.from, copy.bytes,
                                       cudaMemcpyHostToDevice);
      last = copy_;
    }
    for (const KernelNode& node : nodes) {
      if (error != cudaSuccess) return error;
      const Parameters given(node, parameters);
      cudaGraphNode_t fresh = nullptr;
      error = cudaGraphAddKernelNode(&fresh, graph_, &last, last ? 1 : 0, &given.of_kernel);
      kernels_.push_back(last = fresh);
    }
    return error == cudaSuccess ? cudaGraphInstantiate(&ready_, graph_, 0) : error;
  }
  cudaError_t set(const PinnedCopy& copy) override {
    return forgotten(cudaGraphExecMemcpyNodeSetParams1D(ready_, copy_, copy.to, copy.from, copy.bytes,
                                                        cudaMemcpyHostToDevice));
  }
  cudaError_t set(std::size_t index, const KernelNode& node, const std::byte* parameters) override {
    const Parameters given(node, parameters);
    return forgotten(cudaGraphExecKernelNodeSetParams(ready_, kernels_[index], &given.of_kernel));
  }
  cudaError_t launch() override { return forgotten(cudaGraphLaunch(ready_, stream())); }

 private:
  struct Parameters {
    std::vector<void*> each;
    cudaKernelNodeParams of_kernel{};
    Parameters(const KernelNode& node, const std::byte* parameters) {
      for (std::size_t i = 0; i < node.layout->count; ++i)  // CUDA reads them only
        each.push_back(const_cast<std::byte*>(parameters + node.at + node.layout->offsets[i]));
      of_kernel.func = reinterpret_cast<void*>(node.kernel);
      of_kernel.gridDim = node.grid;
      of_kernel.blockDim = node.block;
      of_kernel.sharedMemBytes = static_cast<unsigned>(node.shared_bytes);
      of_kernel.kernelParams = each.data();
    }
    Parameters(const Parameters&) = delete;
  };
  /// The caller does without the graph, so later calls must not trip over the error.
  static cudaError_t forgotten(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
  }

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t ready_ = nullptr;
  cudaGraphNode_t copy_ = nullptr;
  std::vector<cudaGraphNode_t> kernels_;
};

}  // namespace

std::unique_ptr<Graph> make_graph(const PinnedCopy& copy, std::span<const KernelNode> nodes,
                                  const std::byte* parameters) noexcept {
  try {
    auto graph = std::make_unique<CudaGraph>();
    if (graph->make(copy, nodes, parameters) == cudaSuccess) return graph;
    cudaGetLastError();
  } catch (const std::bad_alloc&) {  // as when the device refuses
  }
  return nullptr;
}

bool same_parameters(const std::byte* a, const std::byte* b, std::size_t bytes) noexcept {
  return std::memcmp(a, b, bytes) == 0;
}

std::string objection(const void* memory, std::size_t bytes) {
  int current = 0;
  check(cudaGetDevice(&current), "Asking for the GPU");
  const auto* first = static_cast<const char*>(memory);
  for (const char* byte : {first, first + (bytes > 0 ? bytes - 1 : 0)}) {
    cudaPointerAttributes attributes{};
    const cudaError_t error = cudaPointerGetAttributes(&attributes, byte);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return "CUDA does not know the address (" + text_of(error) + ")";
    }
    if (attributes.type == cudaMemoryTypeHost || attributes.type == cudaMemoryTypeUnregistered)
      return byte == first ? "it is memory of the host" : "it ends in memory that is not the GPU's";
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != current)
      return "it lies on GPU " + std::to_string(attributes.device) + ", not on GPU " +
             std::to_string(current);
  }
  return "";
}

static_assert(sizeof(cudaIpcMemHandle_t) == kHandleBytes);

MemoryHandle export_memory(void* memory) {
  cudaIpcMemHandle_t handle;
  check(cudaIpcGetMemHandle(&handle, memory), "Exporting memory");
  MemoryHandle bytes;
  std::memcpy(bytes.data(), &handle, bytes.size());
  return bytes;
}

void* import_memory(const MemoryHandle& bytes) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, bytes.data(), bytes.size());
  void* memory = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
  if (error == cudaSuccess) return memory;
  cudaGetLastError();
  throw Error(ErrorCode::kInvalidArgument,
              "The handle opens no memory: " + text_of(error) +
                  ". It must come from another process of this machine that still holds the memory.");
}

void close_memory(void* memory) noexcept { note(cudaIpcCloseMemHandle(memory)); }

void check(cudaError_t error, const char* what) {
  const cudaError_t before = noted.exchange(cudaSuccess);
  if (error == cudaSuccess) error = before;
  if (error != cudaSuccess)
    throw Error(ErrorCode::kInternal, std::string(what) + " failed on the GPU: " + text_of(error) + ".");
}

void note(cudaError_t error) noexcept {
  if (error == cudaSuccess) return;
  cudaError_t none = cudaSuccess;
  noted.compare_exchange_strong(none, error);
}

}  // namespace gpu::device

std::shared_ptr<Backend> make_cuda_backend(std::optional<std::uint64_t> stream) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw Error(ErrorCode::kUnsupported, std::string("There is no usable CUDA device: ") +
                                             (error == cudaSuccess ? "none found" : cudaGetErrorName(error)) +
                                             ".");
  }
  gpu::device::check(cudaSetDevice(0), "Choosing the GPU");
  std::optional<cudaStream_t> caller;
  if (stream) caller = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(*stream));
  return std::make_shared<gpu::GpuBackend>(caller);
}

std::unique_ptr<ModelDevice> make_cuda_model(std::shared_ptr<const Model> model) {
  return std::make_unique<gpu::GpuModel>(std::move(model),
                                         gpu::Cublas::open(gpu::find_cublas(), gpu::device::stream()));
}

}  // namespace innerkv
