/** Models on disk: what they are, where their weights lie, how they write text. */
export { openModel } from './file';
export type {
  CanonicalName,
  LayerTensor,
  ModelConfig,
  ModelFile,
  OpenModelOptions,
  TensorInfo,
  TensorType,
} from './file';
export type { Architecture } from './config';
export type { ChatMessage, ChatOptions, ChatTemplate } from './chat';
export type { DecodeOptions, EncodeOptions, TokenStream, Tokenizer, TokenizerKind } from './tokenizer';
export { MomentsRecorder, type RecordedMoments } from './moments';
export { Model } from './runner';
export type {
  Activations,
  ForwardItem,
  ForwardOptions,
  ModelCacheOptions,
  ModelWeights,
  PassTimes,
  ScoreItem,
  Tokens,
} from './runner';
export { Generation } from './generate';
export type {
  BatchSummary,
  EndReason,
  GenerateOneOptions,
  GenerateOptions,
  GeneratedText,
  GeneratedToken,
  GenerationCost,
  GenerationSummary,
} from './generate';
export type { Prompt } from './prompt';
export type { SamplerOptions } from './sampler';
