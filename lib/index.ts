/** innerkv: a low-bit key-value cache with attention computed from the packed bits. */
export { createBackend, createBackendSync, denseAttention, denseAttentionSync } from './backend';
export type { Backend, BackendInfo, BackendOptions, DenseAttentionOptions } from './backend';
export { KvCache } from './cache';
export type { AppendItem, BatchItem, CacheEstimate, CacheStats, KvCacheOptions, LayerPlan } from './cache';
export { Sequence } from './sequence';
export type { AppendOptions, AttendOptions, LayerState } from './sequence';
export { KvError, errorCodes } from './errors';
export type { ErrorCode, ErrorDetails } from './errors';
export { supportedSpecs, bindingPath } from './binding';
export type { CudaProbe, SupportedSpec } from './binding';
export { DeviceTensor } from './device-tensor';
export type {
  BorrowedMemory,
  Dtype,
  DtypeArray,
  TensorInput,
  TensorOptions,
  TensorOutput,
} from './device-tensor';
export type { ArrayInput } from './tensor';
export type { AbortOptions } from './abort';
export * from './schemes';
export * from './model';
export * from './eval';
