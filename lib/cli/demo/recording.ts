/** Activations recorded from a real model: what the demo feeds to every scheme. */
import { join } from 'node:path';
import { KvError } from '../../errors';
import { parseMoments, selectLayers, type Moments } from '../../schemes/moments';
import { decodeFloats, readSafetensors } from '../../schemes/safetensors';
import { type CacheShape } from '../../schemes/types';

export interface RecordedLayer {
  /** Number of the layer in its model. */
  readonly number: number;
  /** After RoPE, [tokens, kvHeads, headDim]. */
  readonly k: Float32Array;
  readonly v: Float32Array;
  /** After RoPE, not scaled, [tokens, queryHeads, headDim]. */
  readonly q: Float32Array;
  /** k and v as they are in the file, binary16. */
  readonly kHalf: Uint16Array;
  readonly vHalf: Uint16Array;
}

export interface Recording {
  readonly tokens: number;
  readonly shape: CacheShape;
  readonly layers: readonly RecordedLayer[];
  /** Of the recorded layers, renumbered 0, 1, … */
  readonly moments: Moments;
  readonly metadata: Readonly<Record<string, string>>;
}

/** The recording that ships with the package. */
export const DEMO_FILE = join(__dirname, '..', '..', '..', 'data', 'smollm2_demo_1024.safetensors');

/** Rotary embedding of SmolLM2-135M in GGUF order. */
const ROPE = { base: 100000, layout: 'adjacent' } as const;

export function readRecording(path: string = DEMO_FILE): Recording {
  const file = readSafetensors(path);
  const corrupt = (problem: string) => new KvError('ERR_INNERKV_CORRUPT', `${path}: ${problem}.`);
  const all = parseMoments(file, path);
  const numbers = [...all.layers.keys()];
  const { kvHeads, headDim } = all;

  const read = (layer: number, name: string) => {
    const tensor = file.tensors.get(`layers.${layer}.${name}`);
    const data = tensor && decodeFloats(tensor);
    if (tensor?.shape.length !== 3 || !(data instanceof Float32Array))
      throw corrupt(`there is no recording "layers.${layer}.${name}"`);
    const half = new Uint16Array(
      tensor.dtype === 'F16' ? new Uint8Array(tensor.bytes).buffer : new ArrayBuffer(0),
    );
    return { shape: tensor.shape as readonly [number, number, number], data, half };
  };
  const [tokens, queryHeads] = read(numbers[0]!, 'query').shape;
  if (kvHeads !== 1) throw corrupt('it has more than one KV head per layer'); // then [tokens, 1, D] is [1, tokens, D] too
  if (tokens < 2 || queryHeads < 1) throw corrupt('it is empty');
  const tensor = (layer: number, name: string, heads: number) => {
    const { shape, data, half } = read(layer, name);
    const expected = [tokens, heads, headDim];
    if (shape.join() !== expected.join())
      throw corrupt(
        `"layers.${layer}.${name}" has the shape [${shape.join(', ')}] instead of [${expected.join(', ')}]`,
      );
    if (half.length !== data.length) throw corrupt(`"layers.${layer}.${name}" is not binary16`);
    return { data, half };
  };
  return {
    tokens,
    shape: { layers: numbers.length, queryHeads, kvHeads, headDim, rope: ROPE },
    layers: numbers.map((number) => {
      const k = tensor(number, 'key', kvHeads);
      const v = tensor(number, 'value', kvHeads);
      const { data: q } = tensor(number, 'query', queryHeads);
      return { number, k: k.data, v: v.data, q, kHalf: k.half, vHalf: v.half };
    }),
    moments: selectLayers(all, numbers),
    metadata: Object.fromEntries(file.metadata),
  };
}
