/** Saved sequences that are damaged, cut off or of another cache: a KvError, nothing changed, nothing held. */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createBackendSync, KvCache, schemes, type Backend, type KvCacheOptions } from '../../lib';
import { sampleMoments } from '../reference/basis';
import { failure } from '../support/failures';
import { plantedTokens, Random } from '../support/random';

const shape = { layers: 1, queryHeads: 2, kvHeads: 2, headDim: 64 };
let backend: Backend;
beforeAll(() => (backend = createBackendSync({ threads: 1 })));
afterAll(() => backend.dispose());

const create = (options: Partial<KvCacheOptions>) =>
  KvCache.createSync(backend, {
    ...shape,
    scheme: schemes.q8(),
    memory: '1MiB',
    windows: { sink: 1, recent: 1 },
    ...options,
  });

function filled(cache: KvCache, tokens: number) {
  const random = new Random(1);
  const row = cache.shape.kvHeads * cache.shape.headDim;
  const sequence = cache.sequence();
  for (let layer = 0; layer < cache.shape.layers; layer++)
    sequence.appendSync(layer, random.gaussians(tokens * row), random.gaussians(tokens * row));
  return sequence;
}

/** Flips one bit of every byte in turn; answers where neither a KvError nor the same sequence came of it. */
async function survivors(cache: KvCache, bytes: Uint8Array): Promise<number[]> {
  const wrong: number[] = [];
  const broken = Uint8Array.from(bytes);
  for (let i = 0; i < bytes.length; i++) {
    broken[i]! ^= 1 << (i % 8);
    try {
      using loaded = i % 64 === 0 ? await cache.load([broken]) : cache.loadSync(broken);
      if (Buffer.compare(loaded.saveSync(), bytes) !== 0) wrong.push(i);
    } catch (error) {
      if (
        !/^ERR_INNERKV_(CORRUPT|INVALID_ARGUMENT|BASIS_MISMATCH)$/.test(
          String((error as { code?: unknown }).code),
        )
      )
        wrong.push(i);
    }
    broken[i] = bytes[i]!;
  }
  return wrong;
}

test.each([
  ['windows and statistics', schemes.rotated({ keyBits: 2, valueBits: 2, statTokens: 6 }), 8],
  ['compact zero points', schemes.innerq({ preset: 'hybrid', statTokens: 4 }), 40],
])('every byte flipped in turn: %s', async (_, scheme, tokens) => {
  using cache = create({ scheme });
  const sequence = filled(cache, tokens);
  const bytes = sequence.saveSync();
  const used = cache.stats().usedBytes;
  expect(await survivors(cache, bytes)).toEqual([]);
  expect(cache.stats()).toMatchObject({ usedBytes: used, sequences: 1 });
  expect(Buffer.compare(sequence.saveSync(), bytes)).toBe(0);
});

test('a file that is cut off anywhere, or goes on, is corrupt', async () => {
  using cache = create({ windows: { sink: 1, recent: 2 } });
  const codeOf = (bytes: Uint8Array): unknown => {
    try {
      return cache.loadSync(bytes);
    } catch (error) {
      return (error as { code?: unknown }).code;
    }
  };
  for (const [tokens, step] of [
    [2, 1], // windows only
    [5, 97], // with pages
  ] as const) {
    const bytes = filled(cache, tokens).saveSync();
    const codes = new Set<unknown>();
    for (let length = 0; length < bytes.length; length += step) codes.add(codeOf(bytes.subarray(0, length)));
    expect([...codes]).toEqual(['ERR_INNERKV_CORRUPT']);
  }
  const bytes = filled(cache, 2).saveSync();
  expect(codeOf(Buffer.concat([bytes, bytes]))).toBe('ERR_INNERKV_CORRUPT');
  await expect(cache.load([bytes, new Uint8Array(1)])).rejects.toEqual(failure('ERR_INNERKV_CORRUPT'));
  await expect(cache.load([])).rejects.toEqual(failure('ERR_INNERKV_CORRUPT'));
  await expect(cache.load(['INKVSEQ1'] as never)).rejects.toEqual(failure('ERR_INNERKV_INVALID_ARGUMENT'));
  const ends = Array.from(bytes, (_, i) => bytes.subarray(i, i + 1));
  expect((await cache.load(ends)).saveSync()).toEqual(bytes); // a byte at a time
});

test('a file of another cache is refused', () => {
  using cache = create({});
  const bytes = filled(cache, 5).saveSync();
  const others: Partial<KvCacheOptions>[] = [
    { layers: 2 },
    { kvHeads: 1 },
    { headDim: 128 },
    { scheme: schemes.q4_0() },
    { windows: { sink: 2, recent: 1 } },
    { windows: { sink: 1, recent: 2 } },
    { rope: { base: 10000, layout: 'half' } },
  ];
  for (const other of others) {
    using foreign = create(other);
    expect(() => foreign.loadSync(bytes)).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT'));
    expect(foreign.stats()).toMatchObject({ usedBytes: 0, sequences: 0 });
  }
  using same = create({ memory: '2MiB', queryHeads: 4, softcap: 3, slidingWindow: 9 });
  expect(same.loadSync(bytes).saveSync()).toEqual(bytes); // none of these is part of what is stored
});

test('a file of another calibration is refused', () => {
  const moments = (seed: number) => {
    const random = new Random(seed);
    const heads = Array.from({ length: 2 }, () => {
      const sample = sampleMoments(plantedTokens(random, 200, 64), plantedTokens(random, 200, 64));
      return { keyMean: sample.keyMean, keyMoment: sample.keySecond, queryMoment: sample.querySecond };
    });
    return { kvHeads: 2, headDim: 64, layers: new Map([[0, heads]]) };
  };
  const rope = { base: 10000, layout: 'half' } as const;
  const calibrated = (seed: number) =>
    create({ rope, scheme: schemes.calibrated(moments(seed), { keyBits: 2, valueBits: 2 }) });
  using cache = calibrated(1);
  using again = calibrated(1);
  using foreign = calibrated(2);
  const bytes = filled(cache, 9).saveSync();
  expect(again.loadSync(bytes).saveSync()).toEqual(bytes);
  expect(() => foreign.loadSync(bytes)).toThrow(failure('ERR_INNERKV_BASIS_MISMATCH'));
  expect(foreign.stats()).toMatchObject({ usedBytes: 0, sequences: 0 });
});

test('a cache without room refuses a good file and stays as it was', () => {
  using cache = create({ memory: '1MiB' });
  const bytes = filled(cache, 1000).saveSync();
  using small = create({ memory: 200_000 });
  const sequence = filled(small, 5);
  const before = { used: small.stats().usedBytes, saved: sequence.saveSync() };
  expect(() => small.loadSync(bytes)).toThrow(failure('ERR_INNERKV_OUT_OF_MEMORY'));
  expect({ used: small.stats().usedBytes, saved: sequence.saveSync() }).toEqual(before);
});

test('saving where nothing can be written fails and leaves no file behind', async () => {
  using cache = create({});
  const sequence = filled(cache, 5);
  const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
  try {
    await expect(sequence.save(join(folder, 'none', 'a'))).rejects.toMatchObject({ code: 'ENOENT' });
    await expect(cache.load(join(folder, 'none'))).rejects.toMatchObject({ code: 'ENOENT' });
    const abort = AbortSignal.abort(new Error('enough'));
    await expect(sequence.save(join(folder, 'a'), { signal: abort })).rejects.toThrow('enough');
    expect(readdirSync(folder)).toEqual([]);
    writeFileSync(join(folder, 'a'), 'old');
    await Promise.all([sequence.save(join(folder, 'a')), sequence.save(join(folder, 'a'))]);
    expect(readdirSync(folder)).toEqual(['a']);
    expect((await cache.load(join(folder, 'a'))).length()).toBe(5);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
