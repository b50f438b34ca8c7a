/** What GGUF metadata say of a model, and what its tensors are called. */
import { ropeFrequencies } from '../schemes/rope';
import { type RopeOptions } from '../schemes/types';
import { type Source } from './bytes';
import { checkConfig, isArchitecture, type Architecture, type ModelConfig } from './config';
import { type Gguf, type GgufValue } from './gguf';
import {
  canonicalTensors,
  checkTensors,
  corrupt,
  layerName,
  quoted,
  unsupported,
  type CanonicalName,
  type LayerTensor,
  type TensorInfo,
} from './tensors';

const whole: Readonly<Record<string, CanonicalName>> = {
  'token_embd.weight': 'embed',
  'output_norm.weight': 'norm',
  'output.weight': 'head',
};
const perLayer: Readonly<Record<string, LayerTensor>> = {
  'attn_norm.weight': 'attnNorm',
  'attn_q.weight': 'q',
  'attn_k.weight': 'k',
  'attn_v.weight': 'v',
  'attn_output.weight': 'o',
  'attn_q.bias': 'qBias',
  'attn_k.bias': 'kBias',
  'attn_v.bias': 'vBias',
  'attn_q_norm.weight': 'qNorm',
  'attn_k_norm.weight': 'kNorm',
  'ffn_norm.weight': 'ffnNorm',
  'ffn_gate.weight': 'gate',
  'ffn_up.weight': 'up',
  'ffn_down.weight': 'down',
};
/** Divisors of the rotary frequencies, as files of Llama 3.1 carry them; they become part of `rope`. */
const ROPE_FACTORS = 'rope_freqs.weight';

function canonical(name: string): CanonicalName | null | undefined {
  if (name === ROPE_FACTORS || /^blk\.\d+\.attn_rot_embd$/.test(name)) return null;
  if (Object.hasOwn(whole, name)) return whole[name];
  const [, index, rest] = /^blk\.(\d+)\.(.+)$/s.exec(name) ?? [];
  return index !== undefined && Object.hasOwn(perLayer, rest!)
    ? layerName(index, perLayer[rest!]!)
    : undefined;
}

/** Configuration and tensors of a parsed GGUF. `source` is the same file: the rotary factors are read from it. */
export function ggufModel(gguf: Gguf, source: Source) {
  const { path } = gguf;
  const architecture = gguf.metadata.get('general.architecture');
  if (typeof architecture !== 'string') throw corrupt(path, 'its metadata name no architecture');
  if (!isArchitecture(architecture))
    throw unsupported(path, `its architecture is ${quoted(architecture)}, not llama, qwen2 or qwen3`);
  const tensors = canonicalTensors(path, gguf.tensors, canonical);
  const factors = gguf.tensors.find(({ name }) => name === ROPE_FACTORS);
  const config = ggufConfig(
    architecture,
    new Metadata(gguf),
    tensors,
    factors && readFactors(factors, source),
  );
  checkTensors(path, config, tensors);
  return { config, tensors };
}

/** Metadata with their types checked. */
class Metadata {
  constructor(private readonly gguf: Gguf) {}

  get path(): string {
    return this.gguf.path;
  }

  get(key: string): GgufValue | undefined {
    return this.gguf.metadata.get(key);
  }

  number(key: string): number | undefined {
    let value = this.get(key);
    // Some writers give one number per layer even when all are the same.
    if (Array.isArray(value)) {
      const items = value as readonly unknown[];
      if (items.some((item) => item !== items[0]))
        throw unsupported(this.path, `${key} differs from layer to layer`);
      value = items[0] as GgufValue | undefined;
    }
    if (value !== undefined && typeof value !== 'number') throw corrupt(this.path, `${key} is no number`);
    return value;
  }

  required(key: string): number {
    const value = this.number(key);
    if (value === undefined) throw corrupt(this.path, `its metadata lack ${key}`);
    return value;
  }

  text(key: string): string | undefined {
    const value = this.get(key);
    if (value !== undefined && typeof value !== 'string') throw corrupt(this.path, `${key} is no string`);
    return value;
  }
}

function readFactors(tensor: TensorInfo, source: Source): Float64Array {
  if (tensor.type !== 'F32' || tensor.shape.length !== 1 || tensor.bytes > 1 << 16)
    throw corrupt(source.path, `${ROPE_FACTORS} must be a short vector of F32`);
  const bytes = source.read(tensor.offset, tensor.bytes);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Float64Array.from({ length: tensor.shape[0]! }, (_, i) => view.getFloat32(4 * i, true));
}

function ggufConfig(
  architecture: Architecture,
  metadata: Metadata,
  tensors: ReadonlyMap<CanonicalName, TensorInfo>,
  factors: Float64Array | undefined,
): ModelConfig {
  const { path } = metadata;
  const key = (name: string) => `${architecture}.${name}`;
  if ((metadata.number(key('expert_count')) ?? 0) > 0) throw unsupported(path, 'it is a mixture of experts');
  const hidden = metadata.required(key('embedding_length'));
  const queryHeads = metadata.required(key('attention.head_count'));
  const headDim = metadata.number(key('attention.key_length')) ?? hidden / queryHeads;
  if ((metadata.number(key('attention.value_length')) ?? headDim) !== headDim)
    throw unsupported(path, 'its keys and values differ in length');
  const slidingWindow = metadata.number(key('attention.sliding_window'));
  const bos = metadata.number('tokenizer.ggml.bos_token_id');
  return checkConfig(path, {
    architecture,
    layers: metadata.required(key('block_count')),
    hidden,
    intermediate: metadata.required(key('feed_forward_length')),
    queryHeads,
    kvHeads: metadata.number(key('attention.head_count_kv')) ?? queryHeads,
    headDim,
    vocabulary: tensors.get('embed')?.shape[0] ?? 0,
    contextLength: metadata.required(key('context_length')),
    rmsEpsilon: metadata.required(key('attention.layer_norm_rms_epsilon')),
    rope: ggufRope(architecture, metadata, headDim, factors),
    ...(slidingWindow && { slidingWindow }), // 0 means none
    qkNorm: tensors.has('layers.0.qNorm'),
    attentionBias: tensors.has('layers.0.qBias'),
    tiedHead: !tensors.has('head'),
    ...(bos !== undefined && { bos }),
    eos: endTokens(metadata),
  });
}

function ggufRope(
  architecture: Architecture,
  metadata: Metadata,
  headDim: number,
  factors: Float64Array | undefined,
): RopeOptions {
  const { path } = metadata;
  const key = (name: string) => `${architecture}.rope.${name}`;
  const rotaryDims = metadata.number(key('dimension_count')) ?? headDim;
  const plain: RopeOptions = {
    base: metadata.number(key('freq_base')) ?? 10000,
    // Writers of Llama files reorder the rows of q and k for adjacent pairs; those of Qwen files do not.
    layout: architecture === 'llama' ? 'adjacent' : 'half',
    ...(rotaryDims !== headDim && { rotaryDims }),
  };
  const type = metadata.text(key('scaling.type')) ?? 'none';
  const factor = metadata.number(key('scaling.factor')) ?? metadata.number(key('scale_linear')) ?? 1;
  if (type !== 'none' && type !== 'linear')
    throw unsupported(path, `its context is extended by ${quoted(type)}; none and linear are known`);
  const scaling = factor === 1 || type === 'none' ? {} : { scaling: { type: 'linear' as const, factor } };
  if (!factors) return { ...plain, ...scaling };
  if (!factors.every((divisor) => Number.isFinite(divisor) && divisor > 0))
    throw corrupt(path, `${ROPE_FACTORS} must hold positive numbers`);
  if (factors.length !== rotaryDims / 2)
    throw corrupt(path, `${ROPE_FACTORS} has ${factors.length} numbers for ${rotaryDims} rotary dimensions`);
  if (!(plain.base > 0) || !Number.isFinite(plain.base))
    throw corrupt(path, 'the base of RoPE is not positive');
  const theta = ropeFrequencies({ ...plain, ...scaling }, headDim).map((value, i) => value / factors[i]!);
  return { ...plain, theta };
}

/** Control tokens by which chat models end a turn; some files name only one of them as the end of the text. */
const END_NAMES = ['<|endoftext|>', '<|end_of_text|>', '<|im_end|>', '<|eot_id|>', '<|eom_id|>'];
const CONTROL = 3;

function endTokens(metadata: Metadata): number[] {
  const named = ['eos', 'eot', 'eom'].map((name) => metadata.number(`tokenizer.ggml.${name}_token_id`));
  const tokens = metadata.get('tokenizer.ggml.tokens');
  const types = metadata.get('tokenizer.ggml.token_type');
  const found =
    Array.isArray(tokens) && Array.isArray(types)
      ? END_NAMES.map((name) => tokens.indexOf(name)).filter((id) => types[id] === CONTROL)
      : [];
  return [...new Set([...named.filter((id) => id !== undefined), ...found])];
}
