/** Tensors of a model file: how they are stored, what they are called, and what must be there. */
import { inspect } from 'node:util';
import { KvError, type ErrorDetails } from '../errors';
import { type ModelConfig } from './config';

/** Values and bytes of one block of each stored type. Layouts: test/reference/dequantise.ts. */
export const tensorTypes = {
  F32: { block: 1, bytes: 4 },
  F16: { block: 1, bytes: 2 },
  BF16: { block: 1, bytes: 2 },
  Q8_0: { block: 32, bytes: 34 },
  Q4_0: { block: 32, bytes: 18 },
  Q4_1: { block: 32, bytes: 20 },
  Q5_0: { block: 32, bytes: 22 },
  Q5_1: { block: 32, bytes: 24 },
  Q4_K: { block: 256, bytes: 144 },
  Q6_K: { block: 256, bytes: 210 },
  TERNARY: { block: 32, bytes: 8 },
} as const;
export type TensorType = keyof typeof tensorTypes;

/** Where the numbers of one tensor lie. They are never read here: the runner maps them into memory. */
export interface TensorInfo {
  /** Name in the file. */
  readonly name: string;
  readonly type: TensorType;
  /** Row-major, outermost extent first: [out, in] for weights. Blocks run along the last one. */
  readonly shape: readonly number[];
  readonly path: string;
  /** First byte in the file. */
  readonly offset: number;
  readonly bytes: number;
  /** Factor of all numbers; absent: 1. */
  readonly scale?: number;
}

export type LayerTensor =
  | 'attnNorm'
  | ('q' | 'k' | 'v' | 'o')
  | ('qBias' | 'kBias' | 'vBias')
  | ('qNorm' | 'kNorm')
  | ('ffnNorm' | 'gate' | 'up' | 'down');

/** One name per tensor, whatever the file calls it. `head` is absent when it is tied to `embed`. */
export type CanonicalName = 'embed' | 'norm' | 'head' | `layers.${number}.${LayerTensor}`;

/** A model file that is damaged, cut off or contradicts itself. */
export function corrupt(path: string, problem: string, cause?: unknown): KvError {
  return new KvError('ERR_INNERKV_CORRUPT', `${path} is not a valid model: ${problem}.`, { cause });
}

/** A sound model file that asks for something this version cannot do. */
export function unsupported(path: string, problem: string, details: ErrorDetails = {}): KvError {
  return new KvError('ERR_INNERKV_UNSUPPORTED', `${path} cannot be used: ${problem}.`, { details });
}

/** A value from a file, made harmless for messages and terminals. */
export function quoted(value: unknown): string {
  const text = typeof value === 'string' ? JSON.stringify(value) : inspect(value, { depth: 0 });
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}

export function typeNamed(name: string): TensorType | undefined {
  return Object.hasOwn(tensorTypes, name) ? (name as TensorType) : undefined;
}

/** Bytes of a tensor, or undefined where there can be none: a bad extent, rows of broken blocks, more than 2^53. */
export function storedBytes(type: TensorType, shape: readonly number[]): number | undefined {
  const { block, bytes } = tensorTypes[type];
  if (shape.length === 0 || !shape.every((extent) => Number.isSafeInteger(extent) && extent > 0))
    return undefined;
  if (shape.at(-1)! % block !== 0) return undefined;
  const count = shape.reduce((product, extent) => product * extent, 1);
  // Every partial product is at most the whole, so an exact whole means that nothing was rounded on the way.
  const total = (count / block) * bytes;
  return Number.isSafeInteger(count) && Number.isSafeInteger(total) ? total : undefined;
}

/** Shape of every tensor of a model with this configuration. */
export function expectedShapes(config: ModelConfig): Map<CanonicalName, readonly number[]> {
  const { hidden, intermediate, vocabulary, headDim } = config;
  const query = config.queryHeads * headDim;
  const kv = config.kvHeads * headDim;
  const shapes = new Map<CanonicalName, readonly number[]>([
    ['embed', [vocabulary, hidden]],
    ['norm', [hidden]],
  ]);
  if (!config.tiedHead) shapes.set('head', [vocabulary, hidden]);
  const layer: Partial<Record<LayerTensor, readonly number[]>> = {
    ...(!config.bareNorms && { attnNorm: [hidden] }),
    q: [query, hidden],
    k: [kv, hidden],
    v: [kv, hidden],
    o: [hidden, query],
    ...(config.attentionBias && { qBias: [query], kBias: [kv], vBias: [kv] }),
    ...(config.qkNorm && { qNorm: [headDim], kNorm: [headDim] }),
    ...(!config.bareNorms && { ffnNorm: [hidden] }),
    gate: [intermediate, hidden],
    up: [intermediate, hidden],
    down: [hidden, intermediate],
  };
  for (let i = 0; i < config.layers; i++)
    for (const [name, shape] of Object.entries(layer))
      shapes.set(`layers.${i}.${name as LayerTensor}`, shape);
  return shapes;
}

/**
 * `names` maps a name in the file to ours, to `null` for what is not needed, or to undefined for what is unknown: a
 * model with weights that nobody would use is refused rather than run wrongly.
 */
export function canonicalTensors(
  path: string,
  stored: Iterable<TensorInfo>,
  names: (name: string) => CanonicalName | null | undefined,
): Map<CanonicalName, TensorInfo> {
  const tensors = new Map<CanonicalName, TensorInfo>();
  for (const tensor of stored) {
    const name = names(tensor.name);
    if (name === null) continue;
    if (name === undefined)
      throw unsupported(path, `tensor ${quoted(tensor.name)} belongs to no architecture that is known here`);
    if (tensors.has(name)) throw corrupt(path, `there are two tensors ${name}`);
    tensors.set(name, tensor);
  }
  return tensors;
}

/** Throws unless `tensors` are exactly those that `config` asks for, each in its shape. */
export function checkTensors(
  path: string,
  config: ModelConfig,
  tensors: ReadonlyMap<CanonicalName, TensorInfo>,
): void {
  const expected = expectedShapes(config);
  for (const [name, shape] of expected) {
    const tensor = tensors.get(name);
    if (!tensor) throw corrupt(path, `tensor ${name} is missing`);
    if (tensor.shape.length !== shape.length || !shape.every((extent, i) => extent === tensor.shape[i]))
      throw corrupt(
        path,
        `tensor ${name} has shape [${tensor.shape.join(', ')}] where the configuration asks for [${shape.join(', ')}]`,
      );
    if (shape.length === 1 && tensorTypes[tensor.type].block !== 1)
      throw unsupported(
        path,
        `tensor ${name} is a vector in ${tensor.type}; vectors must be F32, F16 or BF16`,
      );
  }
  for (const name of tensors.keys())
    if (!expected.has(name))
      throw corrupt(path, `tensor ${name} has no place in a model of this configuration`);
}

/** `name` in layer `index` (digits from a file name). */
export function layerName(index: string, name: LayerTensor): CanonicalName | undefined {
  return /^(0|[1-9]\d{0,5})$/.test(index) ? `layers.${Number(index)}.${name}` : undefined;
}
