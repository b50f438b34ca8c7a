/** The same numbers, bit for bit, whatever carries out the work: threads, batches, forks, pieces, saved copies. */
import { createHash } from 'node:crypto';
import { type KvCache, type Sequence } from '../../lib';
import { type HeadScheme } from '../reference/cache';
import { toHalfBits } from '../reference/half';
import { attend, attentionDifferences, referenceRows, type NativeAttention } from '../support/attention';
import { backendOf, createCache, disposeBackends, interleave, isas, referenceHeads } from '../support/native';
import { plantedTokens, Random } from '../support/random';
import { attentionFamilies, rotatedHeads, type Treatment } from '../support/treatments';

afterAll(disposeBackends);

const GROUP = 4;
const family = (name: string) => attentionFamilies.find((known) => known.name === name)!;
const families = [
  '16/16',
  'calibrated 2/2',
  'rotated 3/3, no sink',
  'InnerQ 2/2 hybrid',
  'signedMax 4/4',
  'rotated 2/2 with outliers',
].map(family);

function cacheOf({ heads }: Treatment, threads = 2, isa = ''): KvCache {
  return createCache(backendOf(isa, threads), { heads: [heads(64)], group: GROUP });
}

const MOST = 5000;
/** Binary16 patterns of random keys and values, made once: sequences begin at different places of it. */
const pool = Uint16Array.from(new Random(1).gaussians((MOST + 100) * 2 * 64), toHalfBits);

/** A sequence of random tokens; equal seeds make equal sequences. */
function filled(cache: KvCache, tokens: number, seed = 1): Sequence {
  const sequence = cache.sequence();
  const row = cache.shape.kvHeads * 64;
  const rows = (first: number) => pool.subarray(first * row, (first + tokens) * row);
  sequence.appendSync(0, rows(seed), rows(2 * seed + 17));
  return sequence;
}

function queries(cache: KvCache, count: number, seed = 7): Float32Array {
  return new Random(seed).gaussians(count * cache.shape.queryHeads * 64, 0.3);
}

/** jest compares long arrays slowly. */
const bytes = (array: Float32Array) =>
  createHash('sha256')
    .update(new Uint8Array(array.buffer, array.byteOffset, array.byteLength))
    .digest('hex');
const results = ({ out, lse, logits }: NativeAttention) => [out, lse, logits].map(bytes);

describe.each(families)('$name', (family) => {
  test('the number of threads does not matter', () => {
    const [first, ...others] = [1, 2, 3, 8].map((threads) => {
      using cache = cacheOf(family, threads);
      const sequence = filled(cache, MOST); // two runs of up to 4,096 tokens, to be merged
      return [1, 5].flatMap((count) => results(attend(sequence, 0, queries(cache, count), cache.shape)));
    });
    for (const other of others) expect(other).toEqual(first);
  });

  test('a batch of ragged sequences equals single calls', () => {
    using cache = cacheOf(family);
    const batch = [1, 4097, 31, 129, 300].map((tokens, i) => {
      const q = queries(cache, Math.min(tokens, 1 + (i % 3)), i);
      const rows = q.length / 64;
      const [lse, logits] = [new Float32Array(rows), new Float32Array(rows * tokens)];
      return { sequence: filled(cache, tokens, i), q, lse, logits, out: new Float32Array(q.length) };
    });
    for (const causal of [true, false]) {
      const outputs = cache.attendBatchSync(0, batch, { causal });
      batch.forEach(({ sequence, q, lse, logits }, i) => {
        const single = attend(sequence, 0, q, cache.shape, causal);
        expect([outputs[i]!, lse, logits].map(bytes)).toEqual(results(single));
      });
    }
    expect(cache.attendBatchSync(0, [])).toEqual([]);
  });

  test('a batch of appends leaves the bytes of single calls', async () => {
    using cache = cacheOf(family);
    const lengths = [0, 1, 40, 131, 500];
    const [singles, sync, queued] = [1, 2, 3].map(() => {
      const all = lengths.map((tokens, i) => (tokens > 0 ? filled(cache, tokens, i) : cache.sequence()));
      return [...all, all[4]!.forkSync()];
    }) as [Sequence[], Sequence[], Sequence[]];
    const row = cache.shape.kvHeads * 64;
    const waiting: Promise<void>[] = [];
    for (const added of [1, 150, 1]) {
      const items = sync.map((sequence, i) => {
        const tokens = (first: number) => pool.slice((7 * i + first) * row, (8 * i + first + added) * row);
        return { sequence, k: tokens(0), v: tokens(900) };
      });
      items.forEach(({ k, v }, i) => singles[i]!.appendSync(0, k, v));
      cache.appendBatchSync(0, items);
      const again = items.map((item, i) => ({ ...item, sequence: queued[i]! }));
      waiting.push(cache.appendBatch(0, again));
      for (const { k, v } of again) for (const array of [k, v]) array.fill(0x7e00); // they were copied
    }
    await Promise.all(waiting);
    const saved = (sequence: Sequence) => createHash('sha256').update(sequence.saveSync()).digest('hex');
    expect(sync.map(saved)).toEqual(singles.map(saved));
    expect(queued.map(saved)).toEqual(singles.map(saved));
    expect(sync.map((sequence) => sequence.length())).toEqual(singles.map((sequence) => sequence.length()));
    cache.appendBatchSync(0, []);
    await cache.appendBatch(0, []);
  });

  test('a fork answers like its origin, and neither sees what the other appends', () => {
    using cache = cacheOf(family);
    const origin = filled(cache, 700);
    const before = results(attend(origin, 0, queries(cache, 3), cache.shape));
    const fork = origin.forkSync();
    const twin = filled(cache, 700);
    expect(results(attend(fork, 0, queries(cache, 3), cache.shape))).toEqual(before);
    const more = new Random(99).gaussians(200 * cache.shape.kvHeads * 64);
    fork.appendSync(0, more, more);
    twin.appendSync(0, more, more);
    expect(results(attend(origin, 0, queries(cache, 3), cache.shape))).toEqual(before);
    expect(results(attend(fork, 0, queries(cache, 3), cache.shape))).toEqual(
      results(attend(twin, 0, queries(cache, 3), cache.shape)),
    );
    const copy = cache.loadSync(origin.saveSync());
    origin.dispose();
    expect(results(attend(copy, 0, queries(cache, 3), cache.shape))).toEqual(before);
  });
});

test('replaced tokens are attended as they are now, removed ones not at all', () => {
  const headDim = 64;
  const schemes: readonly HeadScheme[] = rotatedHeads(4, 3)(headDim);
  const random = new Random(3);
  const keys = schemes.map(() => plantedTokens(random, 300, headDim));
  const values = schemes.map(() => plantedTokens(random, 300, headDim));
  const heads = referenceHeads(schemes, keys, values);
  const [newKeys, newValues] = [0, 1].map(() => schemes.map(() => plantedTokens(random, 2, headDim)));
  const replaced = [4, 200];
  const removed = [5, 127, 131, 132, 287];
  replaced.forEach((position, i) =>
    heads.forEach((head, h) => head.replace(position, newKeys![h]![i]!, newValues![h]![i]!)),
  );
  removed.forEach((position) => heads[1]!.remove(position));
  const q = random.gaussians(2 * GROUP * 2 * headDim, 0.3);
  const rows = referenceRows(q, heads, { queries: 2, queryHeads: 2 * GROUP });
  for (const isa of isas()) {
    using cache = createCache(backendOf(isa), { heads: [schemes], group: GROUP });
    const sequence = cache.sequence();
    sequence.appendSync(0, interleave(keys), interleave(values));
    replaced.forEach((position, i) =>
      sequence.replaceSync(0, position, interleave(newKeys!, i, i + 1), interleave(newValues!, i, i + 1)),
    );
    sequence.removeSync(0, removed, { head: 1 });
    const native = attend(sequence, 0, q, cache.shape);
    expect(attentionDifferences(native, rows)).toEqual([]);
    const logit = (head: number, position: number) => native.logits[head * 300 + position];
    expect(removed.map((position) => logit(GROUP, position))).toEqual(removed.map(() => -Infinity));
    expect(removed.every((position) => Number.isFinite(logit(0, position)))).toBe(true);
  }
});
