/** The sampler against the definitions of its parts, and its draws against their probabilities. */
import {
  candidates,
  draw,
  greedy,
  penalised,
  Random,
  Sampler,
  samplerSettings,
  type Cuts,
} from '../../lib/model/sampler';
import { failure } from '../support/failures';
import { Random as TestRandom } from '../support/random';

const everything: Cuts = { temperature: 1, topK: 0, topP: 1, minP: 0 };
const random = new TestRandom(5);

/** Logits with ties, extremes, and exclusions. */
function someLogits(count: number): Float32Array {
  return Float32Array.from({ length: count }, () =>
    random.pick([random.gaussian() * 4, Math.round(random.gaussian() * 2), random.below(20) ? 0 : -Infinity]),
  );
}

/** The same by sorting: temperature, softmax, top-k, renormalise, top-p, min-p, step by step. */
function naive(logits: Float32Array, { temperature, topK, topP, minP }: Cuts): Map<number, number> {
  const scaled = Array.from(logits, (logit) => logit / temperature);
  const largest = Math.max(...scaled);
  const sum = (list: { p: number }[]) => list.reduce((a, { p }) => a + p, 0);
  const normalised = (list: { id: number; p: number }[]) =>
    list.map(({ id, p }) => ({ id, p: p / sum(list) }));
  let kept = normalised(scaled.map((logit, id) => ({ id, p: Math.exp(logit - largest) })));
  kept.sort((a, b) => b.p - a.p || a.id - b.id);
  if (topK > 0) kept = normalised(kept.slice(0, topK));
  const before = kept.map((_, i) => sum(kept.slice(0, i)));
  if (topP < 1) kept = normalised(kept.filter((_, i) => i === 0 || before[i]! < topP));
  kept = normalised(kept.filter(({ p }) => p >= minP * kept[0]!.p));
  return new Map(kept.map(({ id, p }) => [id, p]));
}

test.each<[string, Partial<Cuts>]>([
  ['nothing cut', {}],
  ['temperature', { temperature: 0.3 }],
  ['top-k', { topK: 7 }],
  ['top-k of more than there are', { topK: 1000 }],
  ['top-p', { topP: 0.9 }],
  ['top-p of nothing keeps the likeliest', { topP: 0 }],
  ['min-p', { minP: 0.05 }],
  ['min-p of everything keeps the likeliest and its equals', { minP: 1 }],
  ['top-p of what top-k left', { topK: 9, topP: 0.7 }],
  ['all of them', { temperature: 1.7, topK: 20, topP: 0.95, minP: 0.02 }],
])('%s: the definition', (_, changes) => {
  const cuts = { ...everything, ...changes };
  for (let round = 0; round < 40; round++) {
    const logits = someLogits(1 + random.below(60));
    if (!logits.some(Number.isFinite)) continue;
    const { ids, weights } = candidates(logits, cuts);
    const expected = naive(logits, cuts);
    const total = weights.reduce((a, b) => a + b, 0);
    expect([...ids].sort((a, b) => a - b)).toEqual([...expected.keys()].sort((a, b) => a - b));
    // Sums of at most 60 float64 numbers, two exponentials and two divisions of either side.
    ids.forEach((id, i) =>
      expect(Math.abs(weights[i]! / total - expected.get(id)!)).toBeLessThan(256 * 2 ** -53),
    );
  }
});

test('greedy: the largest, of equals the first', () => {
  expect(greedy(Float32Array.of(-3, 2, 5, 5, -Infinity))).toBe(2);
  for (const bad of [[], [NaN], [1, NaN, 2], [1, Infinity], [-Infinity, -Infinity]])
    expect(() => greedy(Float32Array.from(bad))).toThrow(failure('ERR_INNERKV_NOT_FINITE', 'logits'));
});

test('the penalty divides what is positive, multiplies what is negative, and counts a token once', () => {
  const logits = Float32Array.of(2, -2, 3, 0, -1);
  expect([...penalised(logits, [0, 1, 0, 3, 1], 2)]).toEqual([1, -4, 3, 0, -1]);
  expect([...logits]).toEqual([2, -2, 3, 0, -1]);
  expect(penalised(logits, [0], 1)).toBe(logits);
});

test('draws have the frequencies of their weights', () => {
  const ids = Int32Array.of(4, 0, 9, 2, 7);
  const weights = Float64Array.of(5, 0, 2.5, 0.5, 2);
  const source = new Random(1234, 3);
  const counts = new Map<number, number>();
  const draws = 200_000;
  for (let i = 0; i < draws; i++) {
    const id = draw({ ids, weights }, source.uniform());
    counts.set(id, (counts.get(id) ?? 0) + 1);
  }
  expect(counts.get(0)).toBeUndefined();
  let chiSquare = 0;
  weights.forEach((weight, i) => {
    const expected = (draws * weight) / 10;
    if (weight > 0) chiSquare += ((counts.get(ids[i]!) ?? 0) - expected) ** 2 / expected;
  });
  expect(chiSquare).toBeLessThan(16.27); // 3 degrees of freedom, 0.1 %
  expect([draw({ ids, weights }, 0), draw({ ids, weights }, 1 - 2 ** -53)]).toEqual([4, 7]);
});

test('uniform numbers: flat, uncorrelated, of all seeds and streams different', () => {
  const source = new Random(0);
  const cells = new Array<number>(64).fill(0);
  let [product, before] = [0, 0.5];
  const count = 1 << 16;
  for (let i = 0; i < count; i++) {
    const value = source.uniform();
    cells[Math.floor(value * 64)]!++;
    product += (value - 0.5) * (before - 0.5);
    before = value;
  }
  const expected = count / 64;
  expect(cells.reduce((a, n) => a + (n - expected) ** 2 / expected, 0)).toBeLessThan(103.4); // 63 degrees, 0.1 %
  expect(Math.abs(product / count) * 12 * Math.sqrt(count)).toBeLessThan(4); // four standard deviations
  const first = (seed: number, stream: number) => new Random(seed, stream).uniform();
  const firsts = [0, 1, 2, 2 ** 32, 2 ** 32 + 1, 2 ** 53 - 1].flatMap((seed) => [
    first(seed, 0),
    first(seed, 1),
  ]);
  expect(new Set(firsts).size).toBe(firsts.length);
  expect(first(7, 1)).toBe(first(7, 1));
});

test('a sampler: seeded, greedy at temperature 0, penalising recent tokens only', () => {
  const logits = Float32Array.from({ length: 50 }, (_, id) => Math.sin(id) * 3);
  const run = (seed: number, stream = 0) => {
    const sampler = new Sampler(samplerSettings({ temperature: 1, seed }), stream);
    return Array.from({ length: 20 }, () => sampler.next(logits, []));
  };
  expect(run(1)).toEqual(run(1));
  expect(run(1)).not.toEqual(run(2));
  expect(run(1)).not.toEqual(run(1, 1));
  expect(new Sampler(samplerSettings({})).next(logits, [])).toBe(greedy(logits));
  const penal = new Sampler(samplerSettings({ repeatPenalty: 5, repeatWindow: 2 }));
  const best = greedy(logits);
  expect(penal.next(logits, [best, 0])).not.toBe(best);
  expect(penal.next(logits, [best, 0, 0])).toBe(best);
  const off = new Sampler(samplerSettings({ repeatPenalty: 5, repeatWindow: 0 }));
  expect(off.next(logits, [best])).toBe(best);
});

test.each([
  [{ temperature: -1 }, 'temperature'],
  [{ temperature: NaN }, 'temperature'],
  [{ temperature: '1' }, 'temperature'],
  [{ topK: 1.5 }, 'topK'],
  [{ topP: 1.1 }, 'topP'],
  [{ minP: -0.1 }, 'minP'],
  [{ repeatPenalty: 0 }, 'repeatPenalty'],
  [{ repeatWindow: -1 }, 'repeatWindow'],
  [{ seed: 0.5 }, 'seed'],
])('refused: %j', (options, name) => {
  expect(() => samplerSettings(options as never)).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', name));
});
