/** Native caches for the reference's schemes: the same tokens go into both, so that bits and results can be compared. */
import { createBackendSync, KvCache, type LayerScheme, type RopeOptions, type Sequence } from '../../lib';
import { type Backend } from '../../lib/backend';
import { decodedToken } from './decoded';
import { ReferenceHead, type CachedToken, type HeadScheme } from '../reference/cache';
import { type Random } from './random';

/** What a native cache of reference schemes needs beyond the schemes. */
export interface CacheCase {
  /** [layers][kvHeads]; the heads of a layer may differ in their basis only. */
  readonly heads: readonly (readonly HeadScheme[])[];
  /** Query heads per KV head. */
  readonly group?: number;
  readonly memory?: number;
  readonly softmaxScale?: number;
  readonly softcap?: number;
  readonly slidingWindow?: number | readonly number[];
}

const backends = new Map<string, Backend>();

/** INNERKV_BACKEND=cuda runs every test of bits and attention on the GPU. */
const onGpu = process.env.INNERKV_BACKEND === 'cuda';

/** A backend of this instruction set (or 'cuda') and number of threads, made once; on the GPU where all tests are. */
export function backendOf(isa = '', threads = 1): Backend {
  const known = backends.get(`${isa} ${threads}`);
  if (known) return known;
  const made = createBackendSync(
    onGpu ? { backend: 'cuda', threads } : { backend: 'cpu', threads, ...(isa && { isa }) },
  );
  backends.set(`${isa} ${threads}`, made);
  return made;
}

/** Every instruction set this machine runs; 'cuda' alone where tests run on the GPU. */
export function isas(): readonly string[] {
  return onGpu ? ['cuda'] : backendOf().info.availableIsas;
}

export function disposeBackends(): void {
  for (const backend of backends.values()) backend.dispose();
  backends.clear();
}

/** The layer as plain data, from its heads. */
export function layerScheme(heads: readonly HeadScheme[]): LayerScheme {
  const scheme = heads[0]!;
  const ratios = (given: readonly number[] | undefined, otherwise: readonly number[]) => given ?? otherwise;
  const online = (part: HeadScheme['mean']) => part === 'sequence';
  const given = (part: HeadScheme['mean']) => (part === undefined || part === 'sequence' ? undefined : part);
  const { mean, lam, feedback } = scheme;
  return {
    k: scheme.key,
    v: scheme.value,
    sink: scheme.sink,
    recent: scheme.recent,
    blockTokens: scheme.rotation?.blockTokens ?? 0,
    hadamardK: scheme.keyHadamard ?? false,
    hadamardV: scheme.valueHadamard ?? false,
    onlineMean: online(mean),
    onlineLambda: online(lam),
    statTokens: scheme.statTokens ?? 0,
    unbiasedK: scheme.keyRounding?.unbiased ?? false,
    unbiasedV: scheme.valueRounding?.unbiased ?? false,
    clipK: ratios(scheme.keyRounding?.clipRatios, feedback ? [1] : []),
    clipV: ratios(scheme.valueRounding?.clipRatios, []),
    releasedWindows: false,
    basis:
      given(mean) || given(lam) || feedback
        ? heads.map((head) => ({
            ...(given(head.mean) && { mean: given(head.mean)! }),
            ...(given(head.lam) && { lam: given(head.lam)! }),
            ...(head.feedback && {
              order: Uint8Array.from({ length: head.headDim }, (_, i) => head.feedback!.order?.[i] ?? i),
              metric: head.feedback.W,
              feedback: head.feedback.F,
              pivot: head.feedback.d,
            }),
          }))
        : null,
  };
}

export function createCache(backend: Backend, { heads, group = 1, ...rest }: CacheCase): KvCache {
  const first = heads[0]![0]!;
  const rope = heads.flat().find((head) => head.rotation)?.rotation?.rope;
  const ropeOptions: RopeOptions | undefined = rope && {
    base: 10000,
    layout: rope.layout,
    rotaryDims: rope.rotaryDims,
    theta: Float64Array.from(rope.theta),
  };
  return KvCache.createSync(backend, {
    layers: heads.length,
    queryHeads: group * heads[0]!.length,
    kvHeads: heads[0]!.length,
    headDim: first.headDim,
    scheme: { name: 'test', layer: (layer) => layerScheme(heads[layer]!) },
    memory: 2 ** 28,
    ...(ropeOptions && { rope: ropeOptions }),
    ...rest,
  });
}

/** tokens [token][channel] of each head -> [tokens, heads, headDim]. */
export function interleave(
  heads: readonly (readonly Float32Array[])[],
  first = 0,
  end = Infinity,
): Float32Array {
  const [count, dim] = [Math.min(end, heads[0]!.length) - first, heads[0]![0]?.length ?? 0];
  const all = new Float32Array(count * heads.length * dim);
  for (let t = 0; t < count; t++)
    heads.forEach((tokens, h) => all.set(tokens[first + t]!, (t * heads.length + h) * dim));
  return all;
}

/** Appends in calls of 1 to `most` tokens. */
export function appendRagged(
  sequence: Sequence,
  layer: number,
  keys: readonly (readonly Float32Array[])[],
  values: readonly (readonly Float32Array[])[],
  random: Random,
  most = 40,
): void {
  for (let t = 0; t < keys[0]!.length;) {
    const end = Math.min(keys[0]!.length, t + 1 + random.below(most));
    sequence.appendSync(layer, interleave(keys, t, end), interleave(values, t, end));
    t = end;
  }
}

/** A head that decodes each stored token once: tokens never change, they are only replaced. */
export class RememberingHead extends ReferenceHead {
  private readonly keys = new WeakMap<CachedToken, Float64Array>();
  private readonly values = new WeakMap<CachedToken, Float64Array>();

  override key(token: CachedToken): Float64Array {
    return remembered(this.keys, token, () => super.key(token));
  }

  override value(token: CachedToken): Float64Array {
    return remembered(this.values, token, () => super.value(token));
  }

  override fork(): RememberingHead {
    return Object.assign(new RememberingHead(this.scheme), super.fork());
  }
}

function remembered<T>(known: WeakMap<CachedToken, T>, token: CachedToken, make: () => T): T {
  const seen = known.get(token);
  if (seen) return seen;
  const made = make();
  known.set(token, made);
  return made;
}

/** Reference heads of one layer after the same tokens. */
export function referenceHeads(
  schemes: readonly HeadScheme[],
  keys: readonly (readonly Float32Array[])[],
  values: readonly (readonly Float32Array[])[],
): RememberingHead[] {
  return schemes.map((scheme, h) => {
    const head = new RememberingHead(scheme);
    keys[h]!.forEach((key, t) => head.append(key, values[h]![t]!));
    return head;
  });
}

/** What readBack() has to give, exactly: k, v [tokens, headDim]. */
export function expectedReadBack(head: ReferenceHead): { k: Float32Array; v: Float32Array } {
  const dim = head.scheme.headDim;
  const k = new Float32Array(head.length * dim).fill(NaN);
  const v = new Float32Array(head.length * dim).fill(NaN);
  for (const token of head.tokens) {
    const { key, value } = decodedToken(head, token);
    k.set(key, token.position * dim);
    v.set(value, token.position * dim);
  }
  return { k, v };
}

/** Undefined when both are equal to the sign of zero, else the first difference in words. */
export function readBackDifference(
  native: { k: Float32Array; v: Float32Array },
  expected: { k: Float32Array; v: Float32Array },
  headDim: number,
): string | undefined {
  for (const name of ['k', 'v'] as const) {
    const [mine, theirs] = [native[name], expected[name]];
    if (mine.length !== theirs.length)
      return `${name} of ${mine.length / headDim} tokens instead of ${theirs.length / headDim}`;
    if (Buffer.compare(bytesOf(mine), bytesOf(theirs)) === 0) continue;
    const at = mine.findIndex((value, i) => !Object.is(value, theirs[i]));
    if (at >= 0)
      return `${name}, position ${Math.floor(at / headDim)}, channel ${at % headDim}: ${mine[at]}, not ${theirs[at]}`;
  }
  return undefined;
}

function bytesOf(array: Float32Array): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}
