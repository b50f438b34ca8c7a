import { type Comparison } from '../../lib/eval/compare';
import { paretoFront } from '../../lib/eval/pareto';
import { planOf } from '../../lib/eval/protocols';
import { recordOf, suffices, summaryOf, tailOf } from '../../lib/eval/records';
import { Random } from '../support/random';

const random = new Random(72);
const uniform = () => random.below(1e6) / 1e6;
const plan = planOf('P3', { window: 64 });
const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;

const comparisons = () =>
  Array.from({ length: 32 }, (_, i): Comparison & { position: number } => ({
    position: 32 + i,
    nll: 5 * uniform(),
    // Heavy tails: most of the largest ones may lie in one window.
    kld: uniform() ** 8,
    sameTop: uniform() < 0.8,
    shift: uniform() - 0.5,
  }));

function measured(windows: number, total = 32 * windows) {
  const all = Array.from({ length: windows }, comparisons);
  all[windows >> 1]!.forEach((one, i) => (all[windows >> 1]![i] = { ...one, kld: 1 + uniform() }));
  const records = all.map((some, window) =>
    recordOf(
      {
        scheme: 'x',
        window,
        bitsPerValue: 2,
        cacheBytes: 1000 + window,
        tokensRun: 63,
        milliseconds: 7,
        comparisons: some,
      },
      plan,
      total,
    ),
  );
  return { all: all.flat(), records };
}

const totals = { plan, base: 2, bytes: 100, numbers: 4000 };

test.each([1, 2, 3, 7, 40])('%i windows put together are all their positions', (windows) => {
  const { all, records } = measured(windows);
  const row = summaryOf(JSON.parse(JSON.stringify(records)) as typeof records, totals);
  const klds = all.map(({ kld }) => kld).sort((a, b) => a - b);
  const rank = 0.99 * (klds.length - 1);
  const [low, high] = [klds[Math.floor(rank)]!, klds[Math.ceil(rank)]!];
  expect(row.kld99).toBeCloseTo(low + (rank % 1) * (high - low), 12);
  expect(row.nll).toBeCloseTo(mean(all.map(({ nll }) => nll)), 12);
  expect(row.perplexity).toBe(Math.exp(row.nll));
  expect(row.perplexityChange).toBe(Math.exp(row.nll) - Math.exp(2));
  expect(row.meanKld).toBeCloseTo(mean(klds), 12);
  expect(row.topAgreement).toBeCloseTo(mean(all.map(({ sameTop }) => Number(sameTop))), 12);
  expect(row.rmsShift).toBeCloseTo(Math.sqrt(mean(all.map(({ shift }) => shift ** 2))), 12);
  expect(row.bitsPerByte).toBeCloseTo((row.nll * all.length) / Math.LN2 / 100, 12);
  expect(row.tokensPerSecond).toBeCloseTo(9000, 9);
  expect(row).toMatchObject({ cacheBytes: 999 + windows, bitsPerValueInAll: (8 * (999 + windows)) / 4000 });
  expect(row.buckets.map(({ from, to }) => [from, to])).toEqual([[32, 40], [40, 48], [48, 56], [56, 64]]); // prettier-ignore
  row.buckets.forEach(({ from, to, nll, kld }) => {
    const inside = all.filter(({ position }) => position >= from && position < to);
    expect(nll).toBeCloseTo(mean(inside.map((one) => one.nll)), 12);
    expect(kld).toBeCloseTo(mean(inside.map((one) => one.kld)), 12);
  });
});

test('records keep what the percentile of all windows needs, and say when they do not', () => {
  const { records } = measured(1, 32 * 40);
  expect(records[0]!.largestKlds).toHaveLength(tailOf(32 * 40));
  expect(tailOf(32 * 40)).toBe(14);
  expect(suffices(records[0]!, 32 * 40)).toBe(true);
  expect(suffices(records[0]!, 32 * 400)).toBe(false);
  const [short] = measured(1).records;
  for (const windows of [1, 4, 8]) expect(suffices(short!, 32 * windows)).toBe(true);
  expect(suffices(short!, 32 * 40)).toBe(false);
  // A window with fewer positions than that keeps all of them.
  expect(suffices(measured(1, 32 * 4000).records[0]!, 32 * 1e6)).toBe(true);
});

test('the Pareto front: what nobody else beats', () => {
  const front = (...points: (readonly [number, number])[]) => paretoFront(points, (point) => point);
  expect(front([1, 9], [2, 5], [3, 5], [4, 6], [5, 1])).toEqual([true, true, false, false, true]);
  expect(front([1, 1], [1, 1])).toEqual([true, true]);
  expect(front([1, 2], [1, 1])).toEqual([false, true]);
  expect(front()).toEqual([]);
});
