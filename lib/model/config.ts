/** What a model is, as plain numbers, with the bounds that make every size that follows from them safe. */
import { ropeFrequencies } from '../schemes/rope';
import { type RopeOptions } from '../schemes/types';
import { corrupt } from './tensors';

/** Geometry and constants of a Llama-shaped model. */
export interface ModelConfig {
  /** `llama` (Llama, SmolLM2, Mistral), `qwen2` or `qwen3`. */
  readonly architecture: Architecture;
  readonly layers: number;
  readonly hidden: number;
  /** Width of the feed-forward layers. */
  readonly intermediate: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Rows of the embedding. */
  readonly vocabulary: number;
  /** Positions that the model was trained for. */
  readonly contextLength: number;
  readonly rmsEpsilon: number;
  /** With the layout in which this file stores the rows of q and k. */
  readonly rope: RopeOptions;
  /** A query sees this many tokens, itself included; absent: all. */
  readonly slidingWindow?: number;
  /**
   * Norms within layers have neither weights nor epsilon, and stand before the products with `o` and `down` too. Absent: the usual
   * norms, before attention and before the feed-forward layer.
   */
  readonly bareNorms?: true;
  /** Queries and keys are normalised per head before RoPE. */
  readonly qkNorm: boolean;
  /** q, k and v have biases. */
  readonly attentionBias: boolean;
  /** The head is the embedding. */
  readonly tiedHead: boolean;
  readonly bos?: number;
  /** Tokens that end a text. */
  readonly eos: readonly number[];
}

export const architectures = ['llama', 'qwen2', 'qwen3'] as const;
export type Architecture = (typeof architectures)[number];

export function isArchitecture(name: unknown): name is Architecture {
  return architectures.includes(name as Architecture);
}

/** Largest values that are believed. With them no product of extents leaves the safe integers. */
const bounds = {
  layers: 4096,
  hidden: 2 ** 20,
  intermediate: 2 ** 22,
  queryHeads: 4096,
  kvHeads: 4096,
  headDim: 4096,
  vocabulary: 2 ** 22,
  contextLength: 2 ** 31,
} as const;

/** Throws unless `config` could be a model. `path` names the file in messages. */
export function checkConfig(path: string, config: ModelConfig): ModelConfig {
  for (const [name, most] of Object.entries(bounds)) {
    const value = config[name as keyof typeof bounds];
    if (!Number.isInteger(value) || value < 1 || value > most)
      throw corrupt(path, `${name} must be an integer from 1 to ${most}, not ${value}`);
  }
  if (config.queryHeads % config.kvHeads !== 0)
    throw corrupt(path, `${config.queryHeads} query heads cannot share ${config.kvHeads} KV heads evenly`);
  const { rmsEpsilon, slidingWindow, rope } = config;
  if (!(rmsEpsilon > 0 && rmsEpsilon < 1))
    throw corrupt(path, `the epsilon of RMSNorm must lie between 0 and 1, not be ${rmsEpsilon}`);
  if (slidingWindow !== undefined && (!Number.isInteger(slidingWindow) || slidingWindow < 1))
    throw corrupt(path, `the sliding window must be a positive integer, not ${slidingWindow}`);
  for (const id of [...(config.bos === undefined ? [] : [config.bos]), ...config.eos])
    if (!Number.isInteger(id) || id < 0 || id >= config.vocabulary)
      throw corrupt(path, `special token ${id} is not in the vocabulary of ${config.vocabulary}`);
  let frequencies: Float64Array;
  try {
    frequencies = ropeFrequencies(rope, config.headDim);
  } catch (cause) {
    throw corrupt(path, cause instanceof Error ? cause.message.replace(/\.$/, '') : String(cause), cause);
  }
  if (!frequencies.every((theta) => Number.isFinite(theta) && theta >= 0))
    throw corrupt(path, 'its rotary frequencies are no finite positive numbers');
  return config;
}
