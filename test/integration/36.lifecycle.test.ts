/** Aborting, disposing, forgetting: calls settle, the cache is as it was, and nothing of the process is blocked. */
import { createBackendSync, KvCache, schemes, type Backend, type Sequence } from '../../lib';
import { script } from '../support/command';
import { failure } from '../support/failures';
import { Random } from '../support/random';

const shape = { layers: 1, queryHeads: 4, kvHeads: 2, headDim: 64 };
const row = 128;
const DISPOSED = failure('ERR_INNERKV_DISPOSED');
let backend: Backend;
beforeAll(() => (backend = createBackendSync({ threads: 2 })));
afterAll(() => backend.dispose());

function filled(tokens: number, own = backend): { cache: KvCache; sequence: Sequence } {
  const scheme = schemes.rotated({ keyBits: 4, valueBits: 2 });
  const cache = KvCache.createSync(own, { ...shape, scheme, memory: '64MiB' });
  const sequence = cache.sequence();
  const random = new Random(4);
  sequence.appendSync(0, random.gaussians(tokens * row), random.gaussians(tokens * row));
  return { cache, sequence };
}

const ones = (count: number) => new Float32Array(count).fill(1);

describe('abort in flight', () => {
  const limited = (ms: number) => ({ signal: AbortSignal.timeout(ms) });

  test('attention that is being computed stops, and writes nothing into outputs', async () => {
    const { cache, sequence } = filled(2000);
    const saved = sequence.saveSync();
    const q = ones(2000 * 256); // far more work than a turn of the event loop
    const out = new Float32Array(q.length).fill(7);
    const controller = new AbortController();
    const reason = new Error('enough');
    const running = sequence.attend(0, q, { signal: controller.signal, out });
    setImmediate(() => controller.abort(reason));
    await expect(running).rejects.toBe(reason);
    expect(out.every((x) => x === 7)).toBe(true);
    expect(Buffer.compare(sequence.saveSync(), saved)).toBe(0);
    await expect(cache.attendBatch(0, [{ sequence, q }], limited(1))).rejects.toMatchObject({
      name: 'TimeoutError',
    });
    expect(sequence.attendSync(0, ones(256))).toHaveLength(256);
    cache.dispose();
  });

  test('calls that wait in the queue do not start, those before and behind are done', async () => {
    const { cache, sequence } = filled(1000);
    const controller = new AbortController();
    const { signal } = controller;
    const first = sequence.attend(0, ones(1000 * 256));
    const dropped = [
      sequence.append(0, ones(5 * row), ones(5 * row), { signal }),
      cache.appendBatch(0, [{ sequence, k: ones(row), v: ones(row) }], { signal }),
      sequence.truncate(10, { signal }),
      sequence.remove(0, [40], { signal }),
      sequence.replace(0, 41, ones(row), ones(row), { signal }),
      sequence.fork({ signal }),
      sequence.readBack(0, 0, { signal }),
    ];
    const last = sequence.append(0, ones(row), ones(row));
    controller.abort();
    for (const call of dropped) await expect(call).rejects.toMatchObject({ name: 'AbortError' });
    await expect(first).resolves.toHaveLength(1000 * 256);
    await last;
    expect(sequence.layerState(0)).toMatchObject({ tokens: 1001, removed: 0 });
    expect(cache.stats().sequences).toBe(1);
    expect(backend.pending).toBe(0);
    cache.dispose();
  });

  test('an aborted load leaves nothing behind', async () => {
    const { cache, sequence } = filled(500);
    const bytes = sequence.saveSync();
    const used = cache.stats().usedBytes;
    const controller = new AbortController();
    const pieces = async function* () {
      yield bytes.subarray(0, 60_000);
      controller.abort();
      yield await Promise.resolve(bytes.subarray(60_000));
    };
    await expect(cache.load(pieces(), { signal: controller.signal })).rejects.toMatchObject({
      name: 'AbortError',
    });
    expect(cache.stats()).toMatchObject({ usedBytes: used, sequences: 1 });
    cache.dispose();
  });
});

test('everything fails with the same code after dispose()', async () => {
  const { cache, sequence } = filled(200);
  const bytes = sequence.saveSync();
  sequence.dispose();
  const [k, q] = [ones(row), ones(256)];
  const sync = [
    () => sequence.length(),
    () => sequence.layerState(),
    () => sequence.appendSync(0, k, k),
    () => sequence.attendSync(0, q),
    () => sequence.forkSync(),
    () => sequence.truncateSync(0),
    () => sequence.replaceSync(0, 40, k, k),
    () => sequence.removeSync(0, [40]),
    () => sequence.readBackSync(0, 0),
    () => sequence.pageBytes(0, 0, 0),
    () => sequence.saveSync(),
    () => cache.attendBatchSync(0, [{ sequence, q }]),
    () => cache.appendBatchSync(0, [{ sequence, k, v: k }]),
  ];
  for (const call of sync) expect(call).toThrow(DISPOSED);
  const promises = [
    sequence.append(0, k, k),
    sequence.attend(0, q),
    sequence.fork(),
    sequence.truncate(0),
    sequence.replace(0, 40, k, k),
    sequence.remove(0, [40]),
    sequence.readBack(0, 0),
    sequence.save('never-written'),
    sequence.chunks().next(),
    cache.attendBatch(0, [{ sequence, q }]),
    cache.appendBatch(0, [{ sequence, k, v: k }]),
  ];
  const settled = await Promise.allSettled(promises);
  expect(settled).toEqual(promises.map(() => ({ status: 'rejected', reason: DISPOSED })));
  cache.dispose();
  for (const call of [
    () => cache.sequence(),
    () => cache.stats(),
    () => cache.plan(),
    () => cache.loadSync(bytes),
  ])
    expect(call).toThrow(DISPOSED);
  await expect(cache.load([bytes])).rejects.toEqual(DISPOSED);
  const own = createBackendSync({ threads: 1 });
  own.dispose();
  expect(() => KvCache.createSync(own, { ...shape, scheme: schemes.fp16(), memory: 1 })).toThrow(DISPOSED);
});

test('one call too many is refused, and the queue goes on', async () => {
  using own = createBackendSync({ threads: 1, queueLimit: 2 });
  const { sequence } = filled(500, own);
  const calls = [1, 2, 3].map(() => sequence.attend(0, ones(256 * 100)));
  await expect(calls[2]).rejects.toEqual(failure('ERR_INNERKV_QUEUE_FULL'));
  await Promise.all(calls.slice(0, 2));
  await expect(sequence.attend(0, ones(256))).resolves.toHaveLength(256);
});

const SETUP = `
  const { createBackendSync, KvCache, schemes } = require('./lib');
  const backend = createBackendSync({ threads: 1 });
  const make = () => KvCache.createSync(backend, { layers: 1, queryHeads: 1, kvHeads: 1, headDim: 64,
    scheme: schemes.fp16(), memory: '8MiB' });
`;

describe('processes of their own', () => {
  test('what was forgotten is freed, and one warning says where it was made', () => {
    const code = `${SETUP}
      (function forgetful() {
        for (let i = 0; i < 50; i++) make().sequence().appendSync(0, new Float32Array(6400), new Float32Array(6400));
      })();
      const kept = make();
      process.on('warning', (w) => console.log(w.name, /collected without dispose.*created here/s.test(w.message)));
      (async () => {
        for (let i = 0; i < 20; i++) { global.gc(); await new Promise((done) => setTimeout(done, 10)); }
        console.log('children', backend.life.childCount);
      })();`;
    const warned = script(code, ['--expose-gc'], { INNERKV_DEBUG_LEAKS: '1' });
    expect(warned).toEqual({
      status: 0,
      stdout: 'InnerKvLeakWarning true\nchildren 1\n',
      stderr: expect.any(String),
    });
    expect(script(code, ['--expose-gc'])).toEqual({ status: 0, stdout: 'children 1\n', stderr: '' });
  });

  test('forgotten tensors are freed; the owner of borrowed memory lives as long as the tensor and its calls', () => {
    const code = `${SETUP}
      const { DeviceTensor } = require('./lib');
      let collected = 0;
      const registry = new FinalizationRegistry(() => collected++);
      const own = backend.tensorSync([1 << 20], 'f32');
      const sequence = make().sequence();
      const many = new Float32Array(64 * 8000);
      sequence.appendSync(0, many, many);
      const borrow = () => {
        const owner = { memory: own };
        registry.register(owner, 0);
        return DeviceTensor.borrow(backend, { pointer: own.pointer, shape: [1024, 64], dtype: 'f32', owner });
      };
      (function forgetful() { for (let i = 0; i < 50; i++) backend.tensorSync([1 << 20], 'f32'); })();
      const collect = async () => { for (let i = 0; i < 10; i++) { global.gc(); await new Promise((done) => setTimeout(done, 5)); } };
      process.on('warning', (w) => console.log(/A tensor was collected without dispose.*created here/s.test(w.message)));
      (async () => {
        await collect();
        console.log('children', backend.life.childCount);
        let held = borrow();
        await collect();
        console.log('held', collected);
        const before = sequence.attend(0, many); // keeps the queue busy
        const call = sequence.append(0, held, held);
        held.dispose();
        held = undefined;
        let [rounds, lost] = [0, 0];
        for (; rounds < 5; rounds++) {
          global.gc();
          await new Promise((done) => setTimeout(done, 5));
          if (backend.pending < 2) break;
          lost = collected;
        }
        console.log('under way', lost, rounds > 0);
        await Promise.all([before, call]);
        await collect();
        console.log('gone', collected);
      })();`;
    const { status, stdout } = script(code, ['--expose-gc'], { INNERKV_DEBUG_LEAKS: '1' });
    expect({ status, stdout }).toEqual({
      status: 0,
      stdout: 'true\nchildren 2\nheld 0\nunder way 0 true\ngone 1\n',
    });
  });

  test('promises do not need the thread pool of libuv', () => {
    // pbkdf2 holds the only thread; crypto is done long after, so the order says who waited for whom.
    const { status, stdout } = script(
      `${SETUP}
      const order = [];
      const sequence = make().sequence();
      require('crypto').pbkdf2('a', 'b', 3e6, 64, 'sha512', () => { order.push('pool'); console.log(order.join()); });
      (async () => {
        await sequence.append(0, new Float32Array(640), new Float32Array(640));
        await sequence.attend(0, new Float32Array(64));
        order.push('innerkv');
      })();`,
      [],
      { UV_THREADPOOL_SIZE: '1' },
    );
    expect({ status, stdout }).toEqual({ status: 0, stdout: 'innerkv,pool\n' });
  });

  test('a process may end with calls under way and nothing disposed', () => {
    const { status, stderr } = script(`${SETUP}
      const sequence = make().sequence();
      sequence.appendSync(0, new Float32Array(6400), new Float32Array(6400));
      for (let i = 0; i < 20; i++) void sequence.attend(0, new Float32Array(6400));
      setImmediate(() => process.exit(0));`);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  });

  test('workers have backends of their own, hand over results, and may be ended in the middle of a call', () => {
    const worker = `
      require('ts-node').register({ transpileOnly: true });
      const { parentPort, workerData } = require('worker_threads');
      ${SETUP}
      const sequence = make().sequence();
      const x = new Float32Array(64 * 2000).fill(workerData);
      sequence.appendSync(0, x, x);
      (async () => {
        const q = await backend.tensor([64], 'f32', { data: new Float32Array(64).fill(1) });
        const out = await sequence.attend(0, q);
        parentPort.postMessage(out, [out.buffer]);
        const [many, results] = [await backend.tensor([2000, 64], 'f32', { data: x }), await backend.tensor([2000, 64], 'f32')];
        for (;;) await sequence.attend(0, many, { out: results });
      })();`;
    const { status, stdout, stderr } = script(`
      const { Worker } = require('worker_threads');
      ${SETUP}
      const own = make().sequence();
      (async () => {
        const workers = [1, 2].map((n) => new Worker(${JSON.stringify(worker)}, { eval: true, workerData: n }));
        const results = await Promise.all(workers.map((w) => new Promise((done, failed) => w.once('message', done).once('error', failed))));
        console.log(results.map((out) => [out.length, out[0]].join()).join(' '));
        await Promise.all(workers.map((w) => w.terminate()));
        own.appendSync(0, new Float32Array(64).fill(3), new Float32Array(64).fill(3));
        console.log((await own.attend(0, new Float32Array(64)))[63]);
      })();`);
    expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: '64,1 64,2\n3\n', stderr: '' });
  });
});
