/** Tensors in a backend's memory: what they hold, who owns it, what is refused, and that caches take them as arrays. */
import {
  createBackendSync,
  denseAttentionSync,
  DeviceTensor,
  KvCache,
  KvError,
  schemes,
  type Backend,
  type Dtype,
  type Sequence,
} from '../../lib';
import { failure } from '../support/failures';
import { Random } from '../support/random';
import { backendOf, disposeBackends } from '../support/native';

const shape = { layers: 1, queryHeads: 4, kvHeads: 2, headDim: 64 };
const row = 128;
const dtypes: readonly Dtype[] = ['f32', 'f16', 'bf16'];
let backend: Backend;
beforeAll(() => (backend = backendOf('', 2)));
afterAll(disposeBackends);

const cacheOf = (scheme = schemes.rotated({ keyBits: 4, valueBits: 2 })) =>
  KvCache.createSync(backend, { ...shape, scheme, memory: '16MiB' });
const gaussians = (count: number, seed = 1) => new Random(seed).gaussians(count);

/** Numbers that every dtype holds exactly, and their array. */
function arrayOf(dtype: Dtype, values: Float32Array): Float32Array | Uint16Array {
  if (dtype === 'f32') return values;
  // Multiples of 1/8 below 16 are exact in bfloat16, and their bits are easy to make.
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  if (dtype === 'bf16') return Uint16Array.from(bits, (x) => x >>> 16);
  return Uint16Array.from(values, (x, i) =>
    x === 0
      ? 0
      : ((bits[i]! >>> 16) & 0x8000) | ((((bits[i]! >>> 23) & 255) - 112) << 10) | ((bits[i]! >>> 13) & 1023),
  );
}
const coarse = (count: number, seed = 1) =>
  gaussians(count, seed).map((x) => Math.max(-15, Math.min(15, Math.round(8 * x) / 8)));

test('a tensor holds zeros, or what was given or written, in each dtype', async () => {
  for (const dtype of dtypes) {
    const values = arrayOf(dtype, coarse(60));
    using zeros = await backend.tensor([3, 20], dtype);
    expect(zeros.readSync()).toEqual(new (dtype === 'f32' ? Float32Array : Uint16Array)(60));
    expect(zeros).toMatchObject({ shape: [3, 20], dtype, length: 60, byteLength: values.byteLength });
    await zeros.write(values);
    expect(await zeros.read()).toEqual(values);
    using given = backend.tensorSync([60], dtype, { data: values });
    expect(given.readSync()).toEqual(values);
    given.writeSync(values.map((x) => x & 7));
    const out = values.slice();
    expect(await given.read(out)).toBe(out);
    expect(out).toEqual(values.map((x) => x & 7));
  }
});

test('an array may be changed once write() has returned; reads and writes keep their order', async () => {
  using tensor = await backend.tensor([4], 'f32');
  const data = Float32Array.of(1, 2, 3, 4);
  const writes = [tensor.write(data)];
  data.fill(9);
  const reads = [tensor.read()];
  writes.push(tensor.write(data));
  reads.push(tensor.read());
  expect(await Promise.all(reads)).toEqual([Float32Array.of(1, 2, 3, 4), Float32Array.of(9, 9, 9, 9)]);
  await Promise.all(writes);
});

test('slices share memory and go with their tensor', () => {
  const tensor = backend.tensorSync([4, 2, 8], 'f16', {
    data: Uint16Array.from({ length: 64 }, (_, i) => i),
  });
  const slice = tensor.slice(1, 2);
  expect(slice.shape).toEqual([2, 2, 8]);
  expect(slice.pointer - tensor.pointer).toBe(32n);
  expect(slice.readSync()).toEqual(Uint16Array.from({ length: 32 }, (_, i) => 16 + i));
  slice.slice(1, 1).writeSync(new Uint16Array(16).fill(7));
  expect(tensor.readSync().subarray(30, 50)).toEqual(
    Uint16Array.of(30, 31, ...Array<number>(16).fill(7), 48, 49),
  );
  tensor.dispose();
  expect(slice.disposed).toBe(true);
});

describe.each([
  ['rotated', schemes.rotated({ keyBits: 4, valueBits: 2 })],
  ['innerq', schemes.innerq({ preset: 'hybrid' })],
  ['fp16', schemes.fp16()],
])('%s', (_, scheme) => {
  test.each(dtypes)(
    'a cache takes tensors of %s and does with them what it does with arrays',
    async (dtype) => {
      using cache = cacheOf(scheme);
      const tokens = 200;
      const [k, v, q] = [1, 2, 3].map((seed) => arrayOf(dtype, coarse(tokens * 256, seed))) as [
        Float32Array | Uint16Array,
        Float32Array | Uint16Array,
        Float32Array | Uint16Array,
      ];
      const options = dtype === 'bf16' ? { dtype } : {};
      const [arrays, tensors, sync] = [cache.sequence(), cache.sequence(), cache.sequence()];
      using keys = backend.tensorSync([tokens, 2, 64], dtype, { data: k.subarray(0, tokens * row) });
      using values = backend.tensorSync([tokens, row], dtype, { data: v.subarray(0, tokens * row) });
      for (const [first, count] of [
        [0, 150],
        [150, 49],
        [199, 1],
      ] as const) {
        const part = (array: Float32Array | Uint16Array) =>
          array.subarray(first * row, (first + count) * row);
        arrays.appendSync(0, part(k), part(v), options);
        await tensors.append(0, keys.slice(first, count), values.slice(first, count));
        sync.appendSync(0, keys.slice(first, count), values.slice(first, count));
      }
      const bytes = arrays.saveSync();
      expect(Buffer.compare(tensors.saveSync(), bytes)).toBe(0);
      expect(Buffer.compare(sync.saveSync(), bytes)).toBe(0);

      const lse = new Float32Array(2 * 4);
      const expected = arrays.attendSync(0, q.subarray(0, 512), { ...options, lse });
      using query = backend.tensorSync([2, 4, 64], dtype, { data: q.subarray(0, 512) });
      using out = backend.tensorSync([2, 4, 64], 'f32');
      using logSums = backend.tensorSync([2, 4], 'f32');
      expect(await tensors.attend(0, query, { out, lse: logSums })).toBe(out);
      expect(out.readSync()).toEqual(expected);
      expect(logSums.readSync()).toEqual(lse);
      expect(tensors.attendSync(0, query)).toEqual(expected); // tensors in, an array out
      out.writeSync(new Float32Array(512));
      expect(sync.attendSync(0, q.subarray(0, 512), { ...options, out })).toBe(out); // and the other way round
      expect(out.readSync()).toEqual(expected);

      const batch = await cache.attendBatch(0, [
        { sequence: tensors, q: query, out },
        { sequence: sync, q: q.subarray(512, 1024), ...options },
      ]);
      expect(batch[0]).toBe(out);
      expect(out.readSync()).toEqual(expected);
      expect(batch[1]).toEqual(arrays.attendSync(0, q.subarray(512, 1024), options));
      const [one, other] = [arrays, tensors].map((sequence) => sequence.forkSync()) as [Sequence, Sequence];
      const [k3, v3] = [k, v].map((array) => array.subarray(0, 3 * row)) as [typeof k, typeof v];
      await cache.appendBatch(0, [
        { sequence: one, k: keys.slice(0, 3), v: values.slice(0, 3) },
        { sequence: other, k: k3, v: v3, ...options },
        { sequence: sync, k: k3, v: values.slice(0, 3), ...options },
      ]);
      const appended = arrays.forkSync();
      appended.appendSync(0, k3, v3, options);
      for (const sequence of [one, other, sync])
        expect(Buffer.compare(sequence.saveSync(), appended.saveSync())).toBe(0);
      if (_ === 'innerq') return;
      arrays.replaceSync(0, 40, k.subarray(0, row), v.subarray(0, row), options);
      await tensors.replace(0, 40, keys.slice(0, 1), values.slice(0, 1));
      expect(Buffer.compare(tensors.saveSync(), arrays.saveSync())).toBe(0);
    },
  );
});

test('a borrowed tensor is the memory of another, and frees nothing', async () => {
  using tensor = await backend.tensor([8, row], 'f32', { data: gaussians(8 * row) });
  const borrowed = DeviceTensor.borrow(backend, {
    pointer: tensor.pointer + 4n * BigInt(row),
    shape: [4, row],
    dtype: 'f32',
    owner: tensor,
  });
  expect(borrowed.readSync()).toEqual(tensor.readSync().subarray(row, 5 * row));
  using cache = cacheOf(schemes.fp16());
  const [a, b] = [cache.sequence(), cache.sequence()];
  await a.append(0, borrowed, borrowed);
  borrowed.dispose();
  expect(() => borrowed.pointer).toThrow(failure('ERR_INNERKV_DISPOSED'));
  b.appendSync(0, tensor.slice(1, 4), tensor.slice(1, 4));
  expect(a.readBackSync(0, 1)).toEqual(b.readBackSync(0, 1));
});

test('a call under way keeps the memory of a tensor that is disposed meanwhile', async () => {
  using cache = cacheOf(schemes.fp16());
  const sequence = cache.sequence();
  const k = await backend.tensor([300, row], 'f32', { data: gaussians(300 * row) });
  const expected = k.readSync().subarray(0, 64).map(Math.fround);
  const calls = [sequence.append(0, k, k), k.read()];
  k.dispose();
  const [, read] = await Promise.all(calls);
  expect((read as Float32Array).subarray(0, 64)).toEqual(expected);
  expect(sequence.length()).toBe(300);
});

describe('whatever is wrong is refused, and nothing has changed', () => {
  let cache: KvCache;
  let seq: Sequence;
  const made: DeviceTensor[] = [];
  const tensor = (sizes: readonly number[], dtype: Dtype = 'f32', data?: Float32Array | Uint16Array) => {
    const one = backend.tensorSync(sizes, dtype, data ? { data } : {});
    made.push(one);
    return one;
  };
  const filled = (value: number, count = row) =>
    tensor([count / row, row], 'f32', new Float32Array(count).fill(value));
  beforeAll(() => {
    cache = cacheOf();
    seq = cache.sequence();
    seq.appendSync(0, gaussians(200 * row), gaussians(200 * row, 2));
  });
  afterAll(() => {
    cache.dispose();
    for (const one of made) one.dispose();
  });

  const INVALID = 'ERR_INNERKV_INVALID_ARGUMENT';
  const NOT_FINITE = 'ERR_INNERKV_NOT_FINITE';
  const borrow = (pointer: bigint, sizes: readonly number[] = [4], dtype: Dtype = 'f32') =>
    DeviceTensor.borrow(backend, { pointer, shape: sizes, dtype });
  const cases: [string, string, () => unknown][] = [
    ['no shape', INVALID, () => tensor([])],
    ['a size of 0', INVALID, () => tensor([4, 0])],
    ['a size that is no integer', INVALID, () => tensor([1.5])],
    ['a shape that overflows', INVALID, () => tensor([2 ** 30, 2 ** 30, 2 ** 30])],
    ['a dtype that does not exist', INVALID, () => tensor([4], 'f64' as never)],
    ['data of another length', INVALID, () => tensor([4], 'f32', new Float32Array(5))],
    ['data of another dtype', INVALID, () => tensor([4], 'f32', new Uint16Array(4))],
    ['shared memory', INVALID, () => tensor([4], 'f32', new Float32Array(new SharedArrayBuffer(16)))],
    ['more memory than there is', 'ERR_INNERKV_OUT_OF_MEMORY', () => tensor([2 ** 44])],
    ['reading into an array of another type', INVALID, () => tensor([4]).readSync(new Uint16Array(4))],
    ['reading into a short array', INVALID, () => tensor([4]).readSync(new Float32Array(3))],
    ['a slice beyond the end', INVALID, () => tensor([4, 8]).slice(3, 2)],
    ['an empty slice', INVALID, () => tensor([4, 8]).slice(3, 0)],
    ['borrowing null', INVALID, () => borrow(0n)],
    ['borrowing a number', INVALID, () => borrow(4096 as never)],
    ['borrowing a negative address', INVALID, () => borrow(-4096n)],
    ['borrowing an address of 65 bits', INVALID, () => borrow(2n ** 64n)],
    ['borrowing misaligned memory', INVALID, () => borrow(tensor([8]).pointer + 2n)],
    ['borrowing beyond the end of memory', INVALID, () => borrow(2n ** 64n - 16n, [1024])],
    ['borrowing where there is nothing', INVALID, () => borrow(4096n, [1024])],
    ['borrowing more than is mapped', INVALID, () => borrow(tensor([8]).pointer, [2 ** 44])],
    [
      'a handle of the wrong length',
      INVALID,
      () => DeviceTensor.import(backend, new Uint8Array(63), [4], 'f32'),
    ],
    ['exporting a slice', INVALID, () => tensor([8, 8]).slice(1, 1).exportHandle()],
    ['k of no whole token', INVALID, () => seq.appendSync(0, tensor([3, 50]), tensor([3, 50]))],
    ['heads before tokens', INVALID, () => seq.appendSync(0, tensor([2, 5, 64]), tensor([2, 5, 64]))],
    ['k and v of different lengths', INVALID, () => seq.appendSync(0, tensor([1, row]), tensor([2, row]))],
    ['k and v of different dtypes', INVALID, () => seq.appendSync(0, tensor([row]), tensor([row], 'f16'))],
    [
      'memory that is not aligned to 32 bytes',
      INVALID,
      () => seq.appendSync(0, tensor([row]), borrow(tensor([row + 8]).pointer + 16n, [row])),
    ],
    ['a NaN key', NOT_FINITE, () => seq.appendSync(0, filled(NaN), filled(1))],
    ['an infinite value', NOT_FINITE, () => seq.appendSync(0, filled(1), filled(-Infinity))],
    ['a key beyond binary16', NOT_FINITE, () => seq.appendSync(0, filled(65520), filled(1))],
    ['replacing with NaN', NOT_FINITE, () => seq.replaceSync(0, 40, filled(1), filled(NaN))],
    ['a NaN query', NOT_FINITE, () => seq.attendSync(0, filled(NaN, 256))],
    ['a query of the wrong length', INVALID, () => seq.attendSync(0, tensor([255]))],
    [
      'results in 16 bits',
      INVALID,
      () => seq.attendSync(0, tensor([256]), { out: tensor([256], 'f16') as never }),
    ],
    [
      'results of another length',
      INVALID,
      () => seq.attendSync(0, tensor([256]), { out: tensor([512]) as never }),
    ],
    [
      'results over the query',
      INVALID,
      () => seq.attendSync(0, made[0]!, { out: made[0]! as DeviceTensor<'f32'> }),
    ],
    [
      'results over other results',
      INVALID,
      () => {
        const out = tensor([512]) as DeviceTensor<'f32'>;
        const q = new Float32Array(256);
        const halves = [0n, 768n].map((at) => borrow(out.pointer + at, [256]) as DeviceTensor<'f32'>);
        made.push(...halves);
        cache.attendBatchSync(
          0,
          halves.map((half) => ({ sequence: seq, q, out: half })),
        );
      },
    ],
    [
      'logits in a tensor',
      INVALID,
      () => seq.attendSync(0, tensor([256]), { logits: tensor([800]) as never }),
    ],
    [
      'tensors for dense attention',
      INVALID,
      () => {
        const k = tensor([1, row]) as never;
        denseAttentionSync(backend, { ...shape, k, v: k, q: new Float32Array(256) });
      },
    ],
    [
      'a tensor of another backend',
      INVALID,
      () => {
        using other = createBackendSync({ threads: 1 });
        using k = other.tensorSync([row], 'f32');
        seq.appendSync(0, k, k);
      },
    ],
    [
      'a tensor that was disposed',
      'ERR_INNERKV_DISPOSED',
      () => {
        const k = tensor([row]);
        k.dispose();
        seq.appendSync(0, k, k);
      },
    ],
    ['a stream without a GPU', INVALID, () => createBackendSync({ backend: 'cpu', stream: 1n })],
  ];
  test.each(cases)('%s', (_, code, act) => {
    if (made.length === 0) tensor([256]);
    const snapshot = () => ({ used: cache.stats().usedBytes, bytes: Buffer.from(seq.saveSync()) });
    const before = snapshot();
    let thrown: unknown;
    try {
      act();
    } catch (error) {
      thrown = error;
    }
    expect(thrown).toBeInstanceOf(KvError);
    expect((thrown as KvError).code).toBe(code);
    expect(snapshot().used).toBe(before.used);
    expect(Buffer.compare(snapshot().bytes, before.bytes)).toBe(0);
  });

  test('what is not finite is named as in an array', () => {
    const values = new Float32Array(3 * row).fill(1);
    values[2 * row + 64 + 5] = NaN;
    const details = { tensor: 'v', token: 2, head: 1, channel: 5, value: NaN };
    const good = new Float32Array(3 * row).fill(1);
    for (const [k, v] of [
      [good, values],
      [tensor([3, 2, 64], 'f32', good), tensor([3, 2, 64], 'f32', values)],
    ] as const)
      expect(() => seq.appendSync(0, k, v)).toThrow(
        expect.objectContaining({
          message: 'v at token 2, head 1, channel 5 is NaN.',
          details,
        }) as Error,
      );
  });

  test('asynchronous calls reject; a failure on the way leaves the sequence as it was', async () => {
    const length = seq.length();
    await expect(seq.append(0, filled(NaN), filled(1))).rejects.toEqual(failure(NOT_FINITE));
    await expect(seq.attend(0, filled(NaN, 256))).rejects.toEqual(failure(NOT_FINITE));
    await expect(backend.tensor([2 ** 44], 'f32')).rejects.toEqual(failure('ERR_INNERKV_OUT_OF_MEMORY'));
    await expect(backend.tensor([4], 'f32', { signal: AbortSignal.abort() })).rejects.toThrow();
    expect(seq.length()).toBe(length);
  });
});

if (process.env.INNERKV_BACKEND !== 'cuda')
  test('the CPU has no memory that other processes can open', () => {
    using tensor = backend.tensorSync([64], 'f32');
    expect(() => tensor.exportHandle()).toThrow(failure('ERR_INNERKV_UNSUPPORTED'));
    expect(() => DeviceTensor.import(backend, new Uint8Array(64), [64], 'f32')).toThrow(
      failure('ERR_INNERKV_UNSUPPORTED'),
    );
  });

test('disposing a backend disposes its tensors; the first dispose counts', () => {
  const own = createBackendSync({ threads: 1 });
  const tensor = own.tensorSync([64], 'f32');
  own.dispose();
  expect(tensor.disposed).toBe(true);
  tensor.dispose();
  for (const use of [
    () => tensor.pointer,
    () => tensor.readSync(),
    () => tensor.slice(0, 1),
    () => tensor.exportHandle(),
  ])
    expect(use).toThrow(failure('ERR_INNERKV_DISPOSED'));
  expect(() => own.tensorSync([4], 'f32')).toThrow(failure('ERR_INNERKV_DISPOSED'));
});
