/**
 * Calibration moments: per layer and KV head the mean and second moment of keys and the second moment of queries, all
 * before RoPE. A model has one such file (safetensors); tensors that are not moments may stand beside them. Files that know
 * their model are closed by a checksum over everything in them.
 */
import { createHash } from 'node:crypto';
import { KvError, invalid } from '../errors';
import { ropeFrequencies } from './rope';
import { decodeFloats, encodeSafetensors, parseSafetensors, readSafetensors } from './safetensors';
import { type FloatArray, type Safetensors } from './safetensors';
import { type CacheShape, type RopeOptions } from './types';

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
  /** Whose they are; a cache of another model refuses them. Absent: nobody knows. */
  readonly origin?: MomentsOrigin;
}

export interface MomentsOrigin {
  /** The model's name, for messages. */
  readonly model: string;
  /** ModelFile.fingerprint. */
  readonly fingerprint: string;
  /** The rotary embedding that the moments were taken before. */
  readonly rope: RopeOptions;
  /** Tokens observed. */
  readonly tokens: number;
}

const FORMAT = 'innerkv calibration 1';
const NAME = /^layers\.(0|[1-9]\d{0,3})\.(key_mean|key_moment|query_moment)$/;
const MAX_HEADS = 4096;
const MAX_HEAD_DIM = 1024;

/** Throws ERR_INNERKV_CORRUPT for anything that is not a complete, finite set of moments. */
export function parseMoments(file: Safetensors, source = 'The file'): Moments {
  const corrupt = (problem: string) => new KvError('ERR_INNERKV_CORRUPT', `${source}: ${problem}.`);
  const sha256 = file.metadata.get('sha256');
  if (sha256 === undefined ? file.metadata.has('fingerprint') : sha256 !== checksum(file))
    throw corrupt('its checksum is wrong: it is damaged');
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
  const origin = sha256 === undefined ? undefined : parseOrigin(file.metadata, headDim, corrupt);
  const moments = { kvHeads, headDim, layers, ...(origin && { origin }) };
  const problem = flaw(moments);
  if (problem !== undefined) throw corrupt(problem);
  return moments;
}

function parseOrigin(
  metadata: Safetensors['metadata'],
  headDim: number,
  corrupt: (problem: string) => KvError,
): MomentsOrigin {
  const [format = '', model = '', fingerprint = '', rope = '', tokens = ''] = [
    'format',
    'model',
    'fingerprint',
    'rope',
    'tokens',
  ].map((name) => metadata.get(name));
  if (format !== FORMAT) throw corrupt(`its format is ${JSON.stringify(format)}, not "${FORMAT}"`);
  if (!/^[0-9a-f]{64}$/.test(fingerprint)) throw corrupt('it does not say which model it is of');
  if (!/^\d{1,15}$/.test(tokens)) throw corrupt('it does not say how many tokens it was made from');
  try {
    const { theta, ...rest } = JSON.parse(rope) as RopeOptions;
    const options = { ...rest, ...(theta && { theta: Float64Array.from(theta) }) };
    ropeFrequencies(options, headDim);
    return { model, fingerprint, rope: options, tokens: Number(tokens) };
  } catch (cause) {
    throw corrupt(`its rotary embedding makes no sense (${cause instanceof Error ? cause.message : ''})`);
  }
}

/** Hexadecimal SHA-256 over the metadata but itself and all tensors, whatever their order. */
function checksum({ metadata, tensors }: Safetensors): string {
  const byName = <T>(entries: Iterable<[string, T]>) => [...entries].sort(([a], [b]) => (a < b ? -1 : 1));
  const hash = createHash('sha256');
  hash.update(JSON.stringify(byName(metadata).filter(([name]) => name !== 'sha256')));
  for (const [name, { dtype, shape, bytes }] of byName(tensors))
    hash.update(JSON.stringify([name, dtype, shape])).update(bytes);
  return hash.digest('hex');
}

/** Why a cache of this shape must not be calibrated with these moments, or undefined. */
export function misfit({ kvHeads, headDim, origin }: Moments, shape: CacheShape): string | undefined {
  const { model, rope } = shape;
  if (origin && model && origin.fingerprint !== model.fingerprint)
    return (
      `The calibration moments are of another model: ${origin.model} (${origin.fingerprint.slice(0, 12)}…) instead of ` +
      `${model.name} (${model.fingerprint.slice(0, 12)}…).`
    );
  if (kvHeads !== shape.kvHeads || headDim !== shape.headDim)
    return (
      `The calibration moments are of ${kvHeads} KV heads of ${headDim} channels, ` +
      `the cache has ${shape.kvHeads} of ${shape.headDim}.`
    );
  if (!origin || !rope) return undefined;
  const [theirs, ours] = [ropeFrequencies(origin.rope, headDim), ropeFrequencies(rope, headDim)];
  const same = origin.rope.layout === rope.layout && theirs.join() === ours.join();
  return same
    ? undefined
    : "The calibration moments are of a model with another rotary embedding than the cache's.";
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

/**
 * The bytes of a moments file, float32. Moments that know their model get a checksum; `metadata` are further strings.
 */
export function encodeMoments(moments: Moments, metadata: Readonly<Record<string, string>> = {}): Uint8Array {
  const { kvHeads, headDim, origin } = moments;
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
  if (!origin) return encodeSafetensors(tensors, metadata);
  const { model, fingerprint, rope, tokens } = origin;
  const all = {
    ...metadata,
    ...{ format: FORMAT, model, fingerprint, tokens: String(tokens) },
    rope: JSON.stringify({ ...rope, ...(rope.theta && { theta: [...rope.theta] }) }),
  };
  const sha256 = checksum(parseSafetensors(encodeSafetensors(tensors, all)));
  return encodeSafetensors(tensors, { ...all, sha256 });
}
