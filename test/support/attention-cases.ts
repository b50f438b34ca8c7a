/** Attention of one family of schemes in every head size, group, length and mask, against the reference. */
import { type AttentionOptions } from '../reference/attention';
import { HEAD_DIMS } from '../reference/types';
import { attend, attentionDifferences, poisoned, referenceRows, widest } from './attention';
import { backendOf, createCache, interleave, isas, RememberingHead } from './native';
import { plantedTokens, Random } from './random';
import { pairwise, type Chosen } from './specs';
import { attentionFamilies, type Treatment } from './treatments';

const MASKS: readonly AttentionOptions[] = [
  {},
  { slidingWindow: 40 },
  { softcap: 5 },
  { slidingWindow: 3, softcap: 20, scale: 0.07 },
];

const CHOICES = {
  family: attentionFamilies.map(({ name }) => name),
  headDim: HEAD_DIMS,
  group: [1, 3, 4, 7, 8],
  tokens: [0, 1, 31, 32, 33, 95, 96, 97, 113, 127, 128, 129, 257, 1000],
  queries: [1, 2, 5],
  mask: MASKS,
  removed: [false, true],
  causal: [true, false],
} as const;

export type AttentionCase = Chosen<typeof CHOICES>;

/** All cases, in the order of families and head sizes and growing, so that references can be continued. */
export const attentionCases: readonly AttentionCase[] = pairwise(CHOICES).sort(
  (a, b) => a.headDim - b.headDim || a.tokens - b.tokens,
);

/** Reference heads that grow, and the tokens in them. */
class Growing {
  readonly keys: Float32Array[][];
  readonly values: Float32Array[][];
  readonly heads: RememberingHead[];

  constructor(family: Treatment, headDim: number, tokens: number) {
    const schemes = family.heads(headDim);
    const random = new Random(headDim);
    this.keys = schemes.map(() => plantedTokens(random, tokens, headDim));
    this.values = schemes.map(() => plantedTokens(random, tokens, headDim));
    this.heads = schemes.map((scheme) => new RememberingHead(scheme));
  }

  grow(tokens: number): readonly RememberingHead[] {
    this.heads.forEach((head, h) => {
      while (head.length < tokens) head.append(this.keys[h]![head.length]!, this.values[h]![head.length]!);
    });
    return this.heads.map((head) => head.fork());
  }
}

/** Removes some quantised tokens, other ones in each head; nothing where tokens cannot be removed. */
function removals(heads: readonly RememberingHead[], random: Random): number[][] {
  const { key, value } = heads[0]!.scheme;
  const modes = [key, value].map(({ bits, mode }) => (bits === 16 ? 'midRise' : mode));
  if (value.group === 'tokens32' && value.bits !== 16) return [];
  if (modes.some((mode) => mode.startsWith('hybrid'))) return [];
  return heads.map((head) => {
    const candidates = head.tokens.filter(
      (token) => token.key.kind !== 'window' && token.value.kind !== 'window',
    );
    const gone = candidates.map(({ position }) => position).filter(() => random.below(3) === 0);
    for (const position of gone) head.remove(position);
    return gone;
  });
}

/** Runs all cases of a family; answers what is wrong, and the largest share of a bound that was used. */
export function checkFamily(name: string): { wrong: string[]; cases: number; widest: number } {
  const family = attentionFamilies.find((known) => known.name === name)!;
  const mine = attentionCases.filter((one) => one.family === name);
  const grown = new Map<number, Growing>();
  let most = 0;
  const wrong = mine.flatMap((one, i) => {
    const last = mine.filter(({ headDim }) => headDim === one.headDim).at(-1)!.tokens;
    const growing = grown.get(one.headDim) ?? new Growing(family, one.headDim, last);
    grown.set(one.headDim, growing);
    const { found, share } = checkCase(one, growing, i);
    most = Math.max(most, share);
    const { headDim, group, tokens, queries, mask, removed, causal } = one;
    const which = `${headDim} channels, group ${group}, ${tokens} tokens, ${queries} queries, ${JSON.stringify(mask)}`;
    return found.map((what) => `${which}, removed ${removed}, causal ${causal}: ${what}`);
  });
  return { wrong, cases: mine.length, widest: most };
}

/** One case of schemes that are in no family. */
export function checkScheme(
  heads: Treatment['heads'],
  one: Omit<AttentionCase, 'family'>,
  seed: number,
): { found: string[]; share: number } {
  return checkCase(one, new Growing({ name: '', heads }, one.headDim, one.tokens), seed);
}

function checkCase(
  one: Omit<AttentionCase, 'family'>,
  growing: Growing,
  seed: number,
): { found: string[]; share: number } {
  const { headDim, tokens, group, mask } = one;
  const random = new Random(1000 * seed + tokens);
  const heads = growing.grow(tokens);
  const gone = one.removed ? removals(heads, random) : [];
  const causal = one.causal && tokens > 0;
  const queries = causal ? Math.min(one.queries, tokens) : one.queries;
  const queryHeads = group * heads.length;
  const q = random.gaussians(queries * queryHeads * headDim, random.pick([0.05, 0.3, 1]));
  const most = Math.max(2, Math.floor((1500 * 64) / (headDim * (tokens + 1))));
  const rows = referenceRows(q, heads, { ...mask, queries, queryHeads, causal, most, random });

  let share = 0;
  const found = isas().flatMap((isa) => {
    const { scale, softcap, slidingWindow } = mask;
    using cache = createCache(backendOf(isa, 2), {
      heads: [heads.map((head) => head.scheme)],
      group,
      ...(scale !== undefined && { softmaxScale: scale }),
      ...(softcap !== undefined && { softcap }),
      ...(slidingWindow !== undefined && { slidingWindow }),
    });
    const sequence = cache.sequence();
    for (let t = 0; t < tokens;) {
      const end = Math.min(tokens, t + 1 + random.below(200));
      const [k, v] = [growing.keys, growing.values].map((all) => poisoned(interleave(all, t, end)));
      sequence.appendSync(0, k!, v!);
      t = end;
    }
    gone.forEach((positions, head) => sequence.removeSync(0, positions, { head }));
    const native = attend(sequence, 0, q, cache.shape, causal);
    share = Math.max(share, widest(native, rows));
    return attentionDifferences(native, rows).map((what) => `${isa}: ${what}`);
  });
  return { found, share };
}
