/**
 * Calibration moments: per layer and KV head the mean and second moment of keys and the second moment of queries, all
 * before RoPE. A model has one such file (safetensors); tensors that are not moments may stand beside them.
 */
import { KvError, invalid } from '../errors';
import { decodeFloats, encodeSafetensors, readSafetensors } from './safetensors';
import { type FloatArray, type Safetensors } from './safetensors';

/** One KV head; D = headDim, matrices row-major [D, D] and not centred. */
export interface HeadMoments {
  /** E[k], [D]. */
  readonly keyMean: FloatArray;
  /** E[k kᵀ]. */
  readonly keyMoment: FloatArray;
  /** E[q qᵀ] over all query heads of the KV head, q not divided by √D. */
  readonly queryMoment: FloatArray;
}

export interface Moments {
  readonly kvHeads: number;
  readonly headDim: number;
  /** KV heads of each recorded layer. */
  readonly layers: ReadonlyMap<number, readonly HeadMoments[]>;
}

const NAME = /^layers\.(0|[1-9]\d{0,3})\.(key_mean|key_moment|query_moment)$/;
const MAX_HEADS = 4096;
const MAX_HEAD_DIM = 1024;

/** Throws ERR_INNERKV_CORRUPT for anything that is not a complete, finite set of moments. */
export function parseMoments(file: Safetensors, source = 'The file'): Moments {
  const corrupt = (problem: string) => new KvError('ERR_INNERKV_CORRUPT', `${source}: ${problem}.`);
  const numbers = new Set([...file.tensors.keys()].flatMap((name) => NAME.exec(name)?.[1] ?? []));
  const found = [...numbers].map(Number).sort((a, b) => a - b);
  if (found.length === 0) throw corrupt('it holds no moments (tensors "layers.N.key_mean" and so on)');

  const first = file.tensors.get(`layers.${found[0]!}.key_mean`)?.shape ?? [];
  const [kvHeads = 0, headDim = 0] = first;
  if (first.length !== 2 || kvHeads < 1 || kvHeads > MAX_HEADS || headDim < 1 || headDim > MAX_HEAD_DIM)
    throw corrupt(`key_mean of layer ${found[0]!} must have the shape [kvHeads, headDim]`);

  const numbersOf = (layer: number, part: string, shape: readonly number[]): FloatArray => {
    const name = `layers.${layer}.${part}`;
    const tensor = file.tensors.get(name);
    if (!tensor) throw corrupt(`"${name}" is missing`);
    if (tensor.shape.join() !== shape.join())
      throw corrupt(`"${name}" has the shape [${tensor.shape.join(', ')}] instead of [${shape.join(', ')}]`);
    const data = decodeFloats(tensor);
    if (!data) throw corrupt(`"${name}" has the type ${tensor.dtype} instead of F16, BF16, F32 or F64`);
    return data;
  };
  const matrix = [kvHeads, headDim, headDim];
  const layers = new Map(
    found.map((layer) => {
      const means = numbersOf(layer, 'key_mean', [kvHeads, headDim]);
      const keys = numbersOf(layer, 'key_moment', matrix);
      const queries = numbersOf(layer, 'query_moment', matrix);
      const part = (data: FloatArray, head: number, size: number) =>
        data.subarray(head * size, (head + 1) * size);
      const heads = Array.from({ length: kvHeads }, (_, head) => ({
        keyMean: part(means, head, headDim),
        keyMoment: part(keys, head, headDim ** 2),
        queryMoment: part(queries, head, headDim ** 2),
      }));
      return [layer, heads];
    }),
  );
  const moments = { kvHeads, headDim, layers };
  const problem = flaw(moments);
  if (problem !== undefined) throw corrupt(problem);
  return moments;
}

/** What keeps an object of the right type from being moments, or undefined. */
export function flaw({ kvHeads, headDim, layers }: Moments): string | undefined {
  for (const [layer, heads] of layers) {
    if (heads.length !== kvHeads) return `layer ${layer} has ${heads.length} KV heads instead of ${kvHeads}`;
    for (const [head, { keyMean, keyMoment, queryMoment }] of heads.entries()) {
      const at = `of layer ${layer}, head ${head}`;
      if (keyMean.length !== headDim || !keyMean.every(Number.isFinite))
        return `key_mean ${at} must hold ${headDim} finite numbers`;
      const problem = matrixFlaw(keyMoment, headDim) ?? matrixFlaw(queryMoment, headDim);
      if (problem !== undefined) return `a moment ${at} ${problem}`;
    }
  }
  return undefined;
}

function matrixFlaw(matrix: FloatArray, n: number): string | undefined {
  if (matrix.length !== n * n || !matrix.every(Number.isFinite))
    return `must hold ${n} x ${n} finite numbers`;
  const squares = Array.from({ length: n }, (_, i) => matrix[i * (n + 1)]!);
  if (squares.some((square) => square < 0)) return 'has a negative square on its diagonal';
  const tolerance = 1e-3 * Math.max(...squares); // rounding to 16 bits may go either way
  for (let i = 0; i < n; i++)
    for (let j = 0; j < i; j++)
      if (Math.abs(matrix[i * n + j]! - matrix[j * n + i]!) > tolerance) return 'is not symmetric';
  return undefined;
}

/** Reads and checks a file of moments. */
export function readMoments(path: string): Moments {
  return parseMoments(readSafetensors(path), path);
}

/** The moments of some layers of a model, renumbered 0, 1, … in the order given. */
export function selectLayers(moments: Moments, layers: readonly number[]): Moments {
  const chosen = layers.map((layer, index) => {
    const heads = moments.layers.get(layer);
    if (!heads) throw invalid(`There are no calibration moments of layer ${layer}.`);
    return [index, heads] as const;
  });
  return { ...moments, layers: new Map(chosen) };
}

/** The bytes of a moments file, float32. */
export function encodeMoments(moments: Moments, metadata: Readonly<Record<string, string>> = {}): Uint8Array {
  const { kvHeads, headDim } = moments;
  const tensors = new Map<string, { shape: number[]; data: Float32Array }>();
  for (const [layer, heads] of moments.layers) {
    const put = (name: string, shape: number[], part: keyof HeadMoments) =>
      tensors.set(`layers.${layer}.${name}`, {
        shape: [kvHeads, ...shape],
        data: Float32Array.from(heads.flatMap((head) => [...head[part]])),
      });
    put('key_mean', [headDim], 'keyMean');
    put('key_moment', [headDim, headDim], 'keyMoment');
    put('query_moment', [headDim, headDim], 'queryMoment');
  }
  return encodeSafetensors(tensors, metadata);
}
