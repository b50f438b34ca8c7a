/** The public API end to end: every method, asynchronous and synchronous, with the same result. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  createBackendSync,
  denseAttentionSync,
  KvCache,
  schemes,
  type Backend,
  type Sequence,
} from '../../lib';
import { Random } from '../support/random';

const shape = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 64 };
const row = shape.kvHeads * shape.headDim;

let backend: Backend;
beforeAll(() => (backend = createBackendSync({ threads: 2 })));
afterAll(() => backend.dispose());

const cacheOf = (scheme = schemes.rotated({ keyBits: 4, valueBits: 4 }), memory: number | string = '16MiB') =>
  KvCache.createSync(backend, { ...shape, scheme, memory });

function filled(
  cache: KvCache,
  tokens: number,
  seed = 1,
): { seq: Sequence; k: Float32Array; v: Float32Array } {
  const random = new Random(seed);
  const [k, v] = [random.gaussians(tokens * row), random.gaussians(tokens * row)];
  const seq = cache.sequence();
  for (let layer = 0; layer < shape.layers; layer++) seq.appendSync(layer, k, v);
  return { seq, k, v };
}

const query = (seed = 9, tokens = 1) => new Random(seed).gaussians(tokens * shape.queryHeads * shape.headDim);
const state = (seq: Sequence) =>
  [0, 1].map((layer) => ({ ...seq.layerState(layer), ...seq.readBackSync(layer, 1) }));

test('asynchronous calls give what their synchronous twins give', async () => {
  const cache = cacheOf();
  const { seq, k, v } = filled(cache, 300);
  const twin = cache.sequence();
  for (let t = 0; t < 300; t += 100)
    for (let layer = 0; layer < 2; layer++)
      await twin.append(layer, k.subarray(t * row, (t + 100) * row), v.subarray(t * row, (t + 100) * row));
  expect(state(twin)).toEqual(state(seq));
  expect(await twin.attend(1, query())).toEqual(seq.attendSync(1, query()));
  expect(
    await cache.attendBatch(0, [
      { sequence: seq, q: query() },
      { sequence: twin, q: query(3) },
    ]),
  ).toEqual(
    cache.attendBatchSync(0, [
      { sequence: seq, q: query() },
      { sequence: twin, q: query(3) },
    ]),
  );
  const [a, b] = [await seq.fork(), twin.forkSync()];
  await a.truncate(150);
  b.truncateSync(150);
  await a.replace(0, 40, k.subarray(0, row), v.subarray(0, row));
  b.replaceSync(0, 40, k.subarray(0, row), v.subarray(0, row));
  await a.remove(1, [33, 34], { head: 1 });
  b.removeSync(1, [33, 34], { head: 1 });
  expect(state(a)).toEqual(state(b));
  expect(a.layerState(1).removed).toBe(2);
  expect(seq.length()).toBe(300);
  cache.dispose();
});

test('attention of an uncompressed cache is dense attention, with logits and log-sum-exp', () => {
  const cache = cacheOf(schemes.fp16());
  const { seq, k, v } = filled(cache, 200);
  const byHead = (x: Float32Array) =>
    Float32Array.from(x, (_, i) => {
      const [head, token, c] = [Math.floor(i / (200 * 64)), Math.floor(i / 64) % 200, i % 64];
      return Math.fround(x[token * row + head * 64 + c]!);
    });
  const [lse, logits] = [new Float32Array(4), new Float32Array(4 * 200)];
  const out = seq.attendSync(0, query(), { lse, logits });
  const exact = denseAttentionSync(backend, { ...shape, k: byHead(k), v: byHead(v), q: query() });
  out.forEach((value, i) => expect(Math.abs(value - exact[i]!)).toBeLessThan(3e-3)); // binary16 rounding of K and V
  for (let head = 0; head < 4; head++) {
    const sum = logits.subarray(head * 200, head * 200 + 200).reduce((total, x) => total + Math.exp(x), 0);
    expect(Math.log(sum)).toBeCloseTo(lse[head]!, 4);
  }
  cache.dispose();
});

test('a saved sequence comes back bit for bit, from memory, from a file and from pieces', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
  try {
    for (const scheme of [
      schemes.rotated({ keyBits: 2, valueBits: 2 }),
      schemes.innerq({ preset: 'hybrid' }),
      schemes.fp16(),
    ]) {
      const cache = cacheOf(scheme);
      const { seq } = filled(cache, 333);
      const bytes = seq.saveSync();
      await seq.save(join(folder, 'a.innerkv'));
      const pieces = Array.from({ length: Math.ceil(bytes.length / 1000) }, (_, i) =>
        bytes.subarray(i * 1000, i * 1000 + 1000),
      );
      for (const copy of [
        cache.loadSync(bytes),
        await cache.load(join(folder, 'a.innerkv')),
        await cache.load(pieces),
      ]) {
        expect(state(copy)).toEqual(state(seq));
        expect(Buffer.compare(copy.saveSync(), bytes)).toBe(0);
      }
      const broken = Uint8Array.from(bytes);
      broken[bytes.length >> 1]! ^= 1;
      expect(() => cache.loadSync(broken)).toThrow(
        expect.objectContaining({ code: 'ERR_INNERKV_CORRUPT' }) as Error,
      );
      cache.dispose();
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test('inputs may be binary16, bfloat16 or float32, and may be reused once the call has returned', async () => {
  const cache = cacheOf(schemes.fp16());
  const ones = cache.sequence();
  const k = new Uint16Array(row).fill(0x3c00);
  const promise = ones.append(0, k, k);
  k.fill(0);
  await promise;
  await ones.append(0, new Uint16Array(row).fill(0x3f80), new Uint16Array(row).fill(0x3f80), {
    dtype: 'bf16',
  });
  await ones.append(0, new Float32Array(row).fill(1), new Float32Array(row).fill(1));
  expect(new Set(ones.readBackSync(0, 0).k)).toEqual(new Set([1]));
  cache.dispose();
});

test('calls may be queued without waiting: logits are as long as the tokens that are there when the call runs', async () => {
  const cache = cacheOf(schemes.fp16());
  const { seq, k, v } = filled(cache, 3);
  const logits = new Float32Array(4 * 4);
  const append = seq.append(0, k.subarray(0, row), v.subarray(0, row));
  const attend = seq.attend(0, query(), { logits });
  await append;
  await attend;
  expect(logits.every((logit) => logit !== 0)).toBe(true);
  await expect(seq.attend(0, query(), { logits: new Float32Array(4 * 3) })).rejects.toMatchObject({
    code: 'ERR_INNERKV_INVALID_ARGUMENT',
  });
  cache.dispose();
});

test.each([
  { keyOutliers: 0, valueOutliers: 0 },
  { keyOutliers: 1, valueOutliers: 3 },
])('the estimate, the plan and the statistics agree with what is held: %j', (outliers) => {
  const scheme = schemes.rotated({ keyBits: 4, valueBits: 4, ...outliers });
  const cache = cacheOf(scheme);
  expect(cache.stats().usedBytes).toBe(0);
  const { seq } = filled(cache, 128 + 256);
  const estimate = KvCache.estimate({
    ...shape,
    scheme,
    tokens: 128 + 256,
  });
  expect(cache.stats()).toMatchObject({ usedBytes: estimate.totalBytes, sequences: 1 });
  const { windowBytes, codeBytes, scaleBytes, zeroBytes, outlierBytes, paddingBytes } = estimate;
  expect(windowBytes + codeBytes + scaleBytes + zeroBytes + outlierBytes + paddingBytes).toBe(
    estimate.totalBytes,
  );
  const [key, value] = outliers.keyOutliers
    ? [(129 + 384) / 128 / 8, (258 + 3 * 384) / 128 / 8] // bits a number: bytes of a page's rows over its 128 tokens
    : [0, 0];
  expect(outlierBytes).toBe((128 / 8) * 64 * (key + value) * 2 * 2 * 2); // pages of two layers and two heads
  expect(estimate.bitsPerValue).toBeCloseTo(4.25 + (key + value) / 2, 10);
  expect(scheme.bitsPerValue(64)).toBeCloseTo(estimate.bitsPerValue, 10);
  expect(cache.plan()[1]).toMatchObject({
    keyBitsPerValue: 4.25 + key,
    valueBitsPerValue: 4.25 + value,
    layer: 1,
  });
  seq.dispose();
  expect(cache.stats()).toMatchObject({ usedBytes: 0, sequences: 0 });
  cache.dispose();
});

test('disposal goes from parent to child, is idempotent, and waits for nothing', async () => {
  const own = createBackendSync({ threads: 1 });
  const cache = KvCache.createSync(own, { ...shape, scheme: schemes.fp16(), memory: '4MiB' });
  const { seq } = filled(cache, 64);
  const running = seq.attend(0, query());
  cache.dispose();
  cache.dispose();
  expect(seq.disposed).toBe(true);
  await expect(running).resolves.toHaveLength(256);
  expect(() => seq.length()).toThrow(expect.objectContaining({ code: 'ERR_INNERKV_DISPOSED' }) as Error);
  await own[Symbol.asyncDispose]();
  expect(own.disposed).toBe(true);
});

test('an aborted call rejects with the reason and changes nothing', async () => {
  const cache = cacheOf();
  const { seq, k, v } = filled(cache, 140);
  const before = state(seq);
  const reason = new Error('enough');
  await expect(seq.append(0, k, v, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  await expect(seq.attend(0, query(), { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  expect(state(seq)).toEqual(before);
  cache.dispose();
});
