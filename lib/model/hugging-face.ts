/** Folders as Hugging Face keeps models: config.json, safetensors in one file or in shards, tokenizer.json. */
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { parseSafetensorsHeader, safetensorsHeaderBytes } from '../schemes/safetensors';
import { type RopeOptions, type RopeScaling } from '../schemes/types';
import { unreadable, withFile } from './bytes';
import { checkConfig, isArchitecture, type Architecture, type ModelConfig } from './config';
import {
  canonicalTensors,
  checkTensors,
  corrupt,
  layerName,
  quoted,
  storedBytes,
  typeNamed,
  unsupported,
  type CanonicalName,
  type LayerTensor,
  type TensorInfo,
} from './tensors';

const whole: Readonly<Record<string, CanonicalName>> = {
  'model.embed_tokens.weight': 'embed',
  'model.norm.weight': 'norm',
  'lm_head.weight': 'head',
};
const perLayer: Readonly<Record<string, LayerTensor>> = {
  'input_layernorm.weight': 'attnNorm',
  'self_attn.q_proj.weight': 'q',
  'self_attn.k_proj.weight': 'k',
  'self_attn.v_proj.weight': 'v',
  'self_attn.o_proj.weight': 'o',
  'self_attn.q_proj.bias': 'qBias',
  'self_attn.k_proj.bias': 'kBias',
  'self_attn.v_proj.bias': 'vBias',
  'self_attn.q_norm.weight': 'qNorm',
  'self_attn.k_norm.weight': 'kNorm',
  'post_attention_layernorm.weight': 'ffnNorm',
  'mlp.gate_proj.weight': 'gate',
  'mlp.up_proj.weight': 'up',
  'mlp.down_proj.weight': 'down',
};

function canonical(name: string): CanonicalName | null | undefined {
  if (Object.hasOwn(whole, name)) return whole[name];
  const [, index, rest] = /^model\.layers\.(\d+)\.(.+)$/s.exec(name) ?? [];
  if (rest === 'self_attn.rotary_emb.inv_freq') return null; // follows from the configuration
  return index !== undefined && Object.hasOwn(perLayer, rest!)
    ? layerName(index, perLayer[rest!]!)
    : undefined;
}

export type Json = Readonly<Record<string, unknown>>;
const MAX_TEXT = 1 << 26; // tokenizer.json of the largest vocabularies has some 33 MB

/** A file of one JSON object; undefined where there is none. */
export function readJson(path: string): Json | undefined {
  const text = readText(path);
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw corrupt(path, 'it is not JSON', cause);
  }
  if (!isJson(value)) throw corrupt(path, 'it is not a JSON object');
  return value;
}

/** A text file, or undefined where there is none. */
export function readText(path: string): string | undefined {
  let bytes: Uint8Array;
  try {
    const stat = statSync(path, { throwIfNoEntry: false });
    if (!stat) return undefined;
    if (!stat.isFile()) throw new Error('it is not a file');
    if (stat.size > MAX_TEXT) throw new Error(`it is larger than ${MAX_TEXT} bytes`);
    bytes = readFileSync(path);
  } catch (cause) {
    throw unreadable(path, cause);
  }
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw corrupt(path, 'it is not UTF-8', cause);
  }
}

export function isJson(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

export function huggingFaceModel(folder: string) {
  const path = join(folder, 'config.json');
  const json = readJson(path);
  if (!json) throw corrupt(folder, 'it has no config.json');
  const tensors = canonicalTensors(folder, readShards(folder), canonical);
  // A tied head is stored by some writers all the same; the configuration decides.
  if (tied(json)) tensors.delete('head');
  const generation = readJson(join(folder, 'generation_config.json')) ?? {};
  const config = huggingFaceConfig(path, json, generation, tensors);
  checkTensors(folder, config, tensors);
  return { config, tensors };
}

function readShards(folder: string): TensorInfo[] {
  const indexPath = join(folder, 'model.safetensors.index.json');
  const index = readJson(indexPath);
  if (!index) return readShard(join(folder, 'model.safetensors'));
  const map = index.weight_map;
  if (!isJson(map)) throw corrupt(indexPath, 'it has no weight_map');
  for (const file of Object.values(map))
    if (typeof file !== 'string' || !/^[\w.-]+\.safetensors$/.test(file))
      throw corrupt(indexPath, `${quoted(file)} is no name of a shard`);
  const files = [...new Set(Object.values(map) as string[])];
  if (files.length > 4096) throw corrupt(indexPath, `it names ${files.length} shards`);
  const tensors = files.flatMap((file) =>
    readShard(join(folder, file)).filter(({ name }) => Object.hasOwn(map, name) && map[name] === file),
  );
  if (tensors.length !== Object.keys(map).length) {
    const found = new Set(tensors.map(({ name }) => name));
    const [missing] = Object.keys(map).filter((name) => !found.has(name));
    throw corrupt(folder, `tensor ${quoted(missing ?? '')} is not in the shard that the index names`);
  }
  return tensors;
}

function readShard(path: string): TensorInfo[] {
  return withFile(path, (source) => {
    const headerBytes = safetensorsHeaderBytes(source.read(0, Math.min(8, source.size)), source.size, path);
    const dataAt = 8 + headerBytes;
    const { tensors } = parseSafetensorsHeader(source.read(8, headerBytes), source.size - dataAt, path);
    return [...tensors].map(([name, { dtype, shape, begin, end }]) => {
      const type = typeNamed(dtype);
      if (type === undefined || !['F32', 'F16', 'BF16'].includes(type))
        throw unsupported(path, `tensor ${quoted(name)} is stored as ${dtype}; F32, F16 and BF16 are known`);
      if (storedBytes(type, shape) !== end - begin) throw corrupt(path, `tensor ${quoted(name)} is empty`);
      return { name, type, shape, path, offset: dataAt + begin, bytes: end - begin };
    });
  });
}

/** All known architectures take an absent `tie_word_embeddings` for false. */
function tied(json: Json): boolean {
  return json.tie_word_embeddings === true;
}

function huggingFaceConfig(
  path: string,
  json: Json,
  generation: Json,
  tensors: ReadonlyMap<CanonicalName, TensorInfo>,
): ModelConfig {
  const architecture = architectureOf(path, json);
  const number = (name: string): number | undefined => {
    const value = json[name] ?? undefined;
    if (value !== undefined && typeof value !== 'number') throw corrupt(path, `${name} is no number`);
    return value;
  };
  const required = (name: string): number => {
    const value = number(name);
    if (value === undefined) throw corrupt(path, `it lacks ${name}`);
    return value;
  };
  if (json.quantization_config !== undefined && json.quantization_config !== null)
    throw unsupported(path, 'its weights are quantised in a way of their own');
  if (json.hidden_act !== undefined && json.hidden_act !== 'silu')
    throw unsupported(path, `its activation is ${quoted(json.hidden_act)}, not silu`);
  const layers = required('num_hidden_layers');
  const hidden = required('hidden_size');
  const queryHeads = required('num_attention_heads');
  const headDim = number('head_dim') ?? hidden / queryHeads;
  const slidingWindow = windowOf(path, architecture, json, layers, number);
  const bos = number('bos_token_id');
  return checkConfig(path, {
    architecture,
    layers,
    hidden,
    intermediate: required('intermediate_size'),
    queryHeads,
    kvHeads: number('num_key_value_heads') ?? queryHeads,
    headDim,
    vocabulary: tensors.get('embed')?.shape[0] ?? required('vocab_size'),
    contextLength: required('max_position_embeddings'),
    rmsEpsilon: number('rms_norm_eps') ?? 1e-6,
    rope: huggingFaceRope(path, json, headDim),
    ...(slidingWindow !== undefined && { slidingWindow }),
    qkNorm: tensors.has('layers.0.qNorm'),
    attentionBias: tensors.has('layers.0.qBias'),
    tiedHead: tied(json),
    ...(bos !== undefined && { bos }),
    eos: [...new Set([...ids(path, json.eos_token_id), ...ids(path, generation.eos_token_id)])],
  });
}

function architectureOf(path: string, json: Json): Architecture {
  const type = json.model_type === 'mistral' ? 'llama' : json.model_type;
  if (!isArchitecture(type))
    throw unsupported(path, `its model_type is ${quoted(type)}, not llama, mistral, qwen2 or qwen3`);
  return type;
}

/** One window for all layers, or none. */
function windowOf(
  path: string,
  architecture: Architecture,
  json: Json,
  layers: number,
  number: (name: string) => number | undefined,
): number | undefined {
  const kinds = json.layer_types;
  if (Array.isArray(kinds) && new Set(kinds).size > 1)
    throw unsupported(path, 'only some of its layers have a sliding window');
  const window = number('sliding_window');
  if (window === undefined) return undefined;
  if (architecture === 'llama') return json.model_type === 'mistral' ? window : undefined;
  if (json.use_sliding_window !== true) return undefined;
  // The first max_window_layers layers see everything.
  const full = number('max_window_layers') ?? 0;
  if (full >= layers) return undefined;
  if (full > 0) throw unsupported(path, 'only some of its layers have a sliding window');
  return window;
}

function ids(path: string, value: unknown): number[] {
  const list =
    value === undefined || value === null ? [] : Array.isArray(value) ? (value as unknown[]) : [value];
  if (list.length > 256 || !list.every((id) => typeof id === 'number'))
    throw corrupt(path, 'eos_token_id must be a number or a few of them');
  return list;
}

function huggingFaceRope(path: string, json: Json, headDim: number): RopeOptions {
  // Newer files keep the base beside the scaling.
  const given = json.rope_parameters ?? json.rope_scaling ?? {};
  if (!isJson(given)) throw corrupt(path, 'rope_scaling is no object');
  const number = (value: unknown, name: string): number => {
    if (typeof value !== 'number') throw corrupt(path, `${name} is no number`);
    return value;
  };
  const base = number(given.rope_theta ?? json.rope_theta ?? 10000, 'rope_theta');
  const share = number(
    given.partial_rotary_factor ?? json.partial_rotary_factor ?? 1,
    'partial_rotary_factor',
  );
  const plain: RopeOptions = {
    base,
    layout: 'half',
    ...(share !== 1 && { rotaryDims: Math.floor(headDim * share) }),
  };
  const type = given.rope_type ?? given.type ?? 'default';
  if (type === 'default') return plain;
  const field = (name: string) => number(given[name], `rope_scaling.${name}`);
  if (type === 'linear') return { ...plain, scaling: { type, factor: field('factor') } };
  if (type !== 'llama3')
    throw unsupported(path, `its context is extended by ${quoted(type)}; linear and llama3 are known`);
  const scaling: RopeScaling = {
    type,
    factor: field('factor'),
    lowFreqFactor: field('low_freq_factor'),
    highFreqFactor: field('high_freq_factor'),
    originalContext: field('original_max_position_embeddings'),
  };
  return { ...plain, scaling };
}
