/** Whatever is wrong: a KvError with its code, and the cache as it was. */
import {
  createBackendSync,
  denseAttentionSync,
  KvCache,
  KvError,
  schemes,
  type Backend,
  type Sequence,
} from '../../lib';
import { schemeNamed } from '../../lib/schemes';
import { Random } from '../support/random';

const shape = { layers: 1, queryHeads: 4, kvHeads: 2, headDim: 64 };
const row = 128;
let backend: Backend;
let cache: KvCache;
let seq: Sequence;

beforeAll(() => {
  backend = createBackendSync({ threads: 1 });
  cache = KvCache.createSync(backend, {
    ...shape,
    scheme: schemes.rotated({ keyBits: 2, valueBits: 2 }),
    memory: '2MiB',
  });
  seq = cache.sequence();
  const random = new Random(5);
  seq.appendSync(0, random.gaussians(200 * row), random.gaussians(200 * row));
});
afterAll(() => backend.dispose());

const numbers = (n: number, value = 1) => new Float32Array(n).fill(value);
const snapshot = () => ({
  ...seq.layerState(0),
  heads: [0, 1].map((head) => seq.readBackSync(0, head)),
  used: cache.stats().usedBytes,
});

/** One token of `seq`, and then another sequence's, which is what `wrong` says. */
function batch(wrong: { k?: Float32Array; v?: Float32Array; sequence?: Sequence }, layer = 0): void {
  using other = cache.sequence();
  const good = { k: numbers(row), v: numbers(row) };
  cache.appendBatchSync(layer, [
    { sequence: seq, ...good },
    { sequence: other, ...good, ...wrong },
  ]);
}

const INVALID = 'ERR_INNERKV_INVALID_ARGUMENT';
const cases: [string, string, () => unknown][] = [
  ['a length that is no whole token', INVALID, () => seq.appendSync(0, numbers(row + 1), numbers(row + 1))],
  ['k and v of different lengths', INVALID, () => seq.appendSync(0, numbers(row), numbers(2 * row))],
  ['k and v of different dtypes', INVALID, () => seq.appendSync(0, numbers(row), new Uint16Array(row))],
  ['an array of another type', INVALID, () => seq.appendSync(0, new Float64Array(row), numbers(row))],
  [
    'a dtype that does not exist',
    INVALID,
    () => seq.appendSync(0, numbers(row), numbers(row), { dtype: 'f64' as never }),
  ],
  [
    'shared memory',
    INVALID,
    () => seq.appendSync(0, new Float32Array(new SharedArrayBuffer(4 * row)), numbers(row)),
  ],
  ['a layer too many', INVALID, () => seq.appendSync(1, numbers(row), numbers(row))],
  ['a negative layer', INVALID, () => seq.appendSync(-1, numbers(row), numbers(row))],
  ['a NaN key', 'ERR_INNERKV_NOT_FINITE', () => seq.appendSync(0, numbers(row, NaN), numbers(row))],
  [
    'an infinite value',
    'ERR_INNERKV_NOT_FINITE',
    () => seq.appendSync(0, numbers(row), numbers(row, Infinity)),
  ],
  [
    'a key beyond binary16',
    'ERR_INNERKV_NOT_FINITE',
    () => seq.appendSync(0, numbers(row, 65520), numbers(row)),
  ],
  [
    'a NaN in binary16 bits',
    'ERR_INNERKV_NOT_FINITE',
    () => seq.appendSync(0, new Uint16Array(row).fill(0x7e00), new Uint16Array(row)),
  ],
  ['a NaN query', 'ERR_INNERKV_NOT_FINITE', () => seq.attendSync(0, numbers(256, NaN))],
  ['a query of the wrong length', INVALID, () => seq.attendSync(0, numbers(255))],
  ['no query at all', INVALID, () => seq.attendSync(0, numbers(0))],
  ['more queries than tokens', INVALID, () => seq.attendSync(0, numbers(256 * 201))],
  ['an output of the wrong length', INVALID, () => seq.attendSync(0, numbers(256), { out: numbers(255) })],
  [
    'an output of the wrong type',
    INVALID,
    () => seq.attendSync(0, numbers(256), { out: new Float64Array(256) as never }),
  ],
  ['logits of the wrong length', INVALID, () => seq.attendSync(0, numbers(256), { logits: numbers(4) })],
  ['masses of the wrong length', INVALID, () => seq.attendSync(0, numbers(256), { mass: numbers(4) })],
  ['a negative truncation', INVALID, () => seq.truncateSync(-1)],
  ['a fractional truncation', INVALID, () => seq.truncateSync(1.5)],
  ['replacing a sink token', INVALID, () => seq.replaceSync(0, 3, numbers(row), numbers(row))],
  ['replacing a recent token', INVALID, () => seq.replaceSync(0, 199, numbers(row), numbers(row))],
  [
    'replacing with NaN',
    'ERR_INNERKV_NOT_FINITE',
    () => seq.replaceSync(0, 40, numbers(row, NaN), numbers(row)),
  ],
  ['removing from a head too many', INVALID, () => seq.removeSync(0, [40], { head: 2 })],
  ['removing one good and one bad token', INVALID, () => seq.removeSync(0, [40, 5000])],
  ['reading back a head too many', INVALID, () => seq.readBackSync(0, 2)],
  [
    'the pool running out',
    'ERR_INNERKV_OUT_OF_MEMORY',
    () => seq.appendSync(0, numbers(row * 60000), numbers(row * 60000)),
  ],
  [
    'a sequence of another cache in a batch of appends',
    INVALID,
    () => {
      using other = KvCache.createSync(backend, { ...shape, scheme: schemes.fp16(), memory: '1MiB' });
      const items = [seq, other.sequence()].map((sequence) => ({
        sequence,
        k: numbers(row),
        v: numbers(row),
      }));
      cache.appendBatchSync(0, items);
    },
  ],
  [
    'the pool running out for the second of a batch',
    'ERR_INNERKV_OUT_OF_MEMORY',
    () => batch({ k: numbers(row * 60000), v: numbers(row * 60000) }),
  ],
  ['a layer too many for a batch', INVALID, () => batch({}, 1)],
  [
    'a sequence of another cache in a batch',
    INVALID,
    () => {
      using other = KvCache.createSync(backend, { ...shape, scheme: schemes.fp16(), memory: '1MiB' });
      cache.attendBatchSync(0, [{ sequence: other.sequence(), q: numbers(256) }]);
    },
  ],
];

test.each(cases)('%s', (_, code, act) => {
  const before = snapshot();
  let thrown: unknown;
  try {
    act();
  } catch (error) {
    thrown = error;
  }
  expect(thrown).toBeInstanceOf(KvError);
  expect((thrown as KvError).code).toBe(code);
  expect(snapshot()).toEqual(before);
});

test.each<[string, string, () => unknown]>([
  [
    'k of item 1 has 127 numbers; [tokens, kvHeads, headDim] needs a multiple of 128.',
    INVALID,
    () => batch({ k: numbers(row - 1) }),
  ],
  [
    'k of item 1 holds 1 tokens and v of item 1 2; they must be equal.',
    INVALID,
    () => batch({ v: numbers(2 * row) }),
  ],
  [
    'k of item 1 and v of item 1 must have the same dtype.',
    INVALID,
    () => batch({ v: new Uint16Array(row) as never }),
  ],
  [
    'v of item 1 at token 0, head 1, channel 36 is NaN.',
    'ERR_INNERKV_NOT_FINITE',
    () => batch({ v: numbers(row).fill(NaN, 100) }),
  ],
  [
    'Items 0 and 1 are the same sequence; a batch names each only once.',
    INVALID,
    () => batch({ sequence: seq }),
  ],
  [
    'q of item 1 has 255 numbers; [qTokens, queryHeads, headDim] needs a multiple of 256.',
    INVALID,
    () =>
      cache.attendBatchSync(0, [
        { sequence: seq, q: numbers(256) },
        { sequence: seq, q: numbers(255) },
      ]),
  ],
])('a batch is refused by the name of its item: %s', (message, code, act) => {
  const before = snapshot();
  expect(act).toThrow(expect.objectContaining({ name: 'KvError', code, message }) as Error);
  expect(snapshot()).toEqual(before);
});

test.each(['f32', 'f16'])(
  'dense attention finds what is not finite wherever it is, out unchanged (%s)',
  (dtype) => {
    const tokens = 300;
    const heads = { queryHeads: 4, kvHeads: 2, headDim: 64 };
    for (const [tensor, token, bad] of [
      ['k', 0, NaN],
      ['v', 0, Infinity], // outside the sliding window, so its weight is 0
      ['v', 130, NaN],
      ['k', 298, -Infinity],
      ['v', 299, NaN], // masked for the first query
    ] as const) {
      const make = (fill: number) =>
        dtype === 'f32'
          ? numbers(tokens * row, fill)
          : new Uint16Array(tokens * row).fill(fill === 0 ? 0 : 0x3c00);
      const call = { ...heads, k: make(1), v: make(1), slidingWindow: 200 };
      const channel = 17;
      const at = (1 * tokens + token) * 64 + channel; // [kvHeads, tokens, headDim]
      call[tensor][at] = dtype === 'f32' ? bad : Number.isNaN(bad) ? 0x7e01 : bad > 0 ? 0x7c00 : 0xfc00;
      for (const q of [numbers(2 * 256), numbers(2 * 256, 0)])
        for (const logits of [undefined, numbers(2 * 4 * tokens, 9)]) {
          const out = numbers(2 * 256, 7);
          expect(() => denseAttentionSync(backend, { ...call, q, out, ...(logits && { logits }) })).toThrow(
            expect.objectContaining({
              code: 'ERR_INNERKV_NOT_FINITE',
              details: expect.objectContaining({ tensor, token, head: 1, channel }),
            }) as Error,
          );
          expect(out.every((value) => value === 7)).toBe(true);
          expect(logits?.every((value) => value === 9)).not.toBe(false);
        }
    }
  },
);

const options = { ...shape, scheme: schemes.fp16(), memory: '1MiB' };
test.each<[string, string, object]>([
  ['a head dimension without kernels', 'ERR_INNERKV_UNSUPPORTED', { headDim: 72 }],
  ['query heads that do not divide', INVALID, { queryHeads: 3 }],
  ['no layers', INVALID, { layers: 0 }],
  ['a size that is none', INVALID, { memory: 'plenty' }],
  ['negative windows', INVALID, { windows: { sink: -1 } }],
  ['fewer sliding windows than layers', INVALID, { slidingWindow: [] }],
  ['a scheme for too few layers', INVALID, { scheme: [] }],
])('a cache with %s is refused', (_, code, wrong) => {
  expect(() => KvCache.createSync(backend, { ...options, ...wrong })).toThrow(
    expect.objectContaining({ code }) as Error,
  );
});

const perToken = { bits: 2, group: 'token', mode: 'midRise' } as const;
const UNSUPPORTED = 'ERR_INNERKV_UNSUPPORTED';
test.each<[string, string, RegExp, object]>([
  [
    'nine outliers',
    INVALID,
    /outliers of keys must lie between 0 and 8, not 9/,
    { k: { ...perToken, outliers: 9 } },
  ],
  ['fewer than none', INVALID, /outliers of values .* not -1/, { v: { ...perToken, outliers: -1 } }],
  ['one and a half', INVALID, /'outliers' of the tensor spec/, { k: { ...perToken, outliers: 1.5 } }],
  ['a word', INVALID, /'outliers' of the tensor spec/, { v: { ...perToken, outliers: 'many' } }],
  ['2^32 of them', INVALID, /'outliers' of the tensor spec/, { v: { ...perToken, outliers: 2 ** 32 } }],
  ['16-bit keys', UNSUPPORTED, /16-bit keys have no outliers/, { k: { ...perToken, bits: 16, outliers: 1 } }],
  [
    '16-bit values',
    UNSUPPORTED,
    /16-bit values have no outliers/,
    { v: { ...perToken, bits: 16, outliers: 1 } },
  ],
  ['values by 32 tokens', UNSUPPORTED, /tokens32/, { v: { ...perToken, group: 'tokens32', outliers: 1 } }],
])('outliers with %s are refused by name', (_, code, message, wrong) => {
  const scheme = {
    name: 'test',
    layer: (_layer: number, of: typeof shape, windows: { sink: number; recent: number }) => ({
      ...schemes.rotated({ keyBits: 2, valueBits: 2 }).layer(0, of, windows),
      ...wrong,
    }),
  };
  expect(() => KvCache.createSync(backend, { ...options, scheme: scheme })).toThrow(
    expect.objectContaining({ code, message: expect.stringMatching(message) as string }) as Error,
  );
});

test('outliers of keys that are rounded with error feedback are refused by name, of their values not', () => {
  const identity = new Float32Array(64 * 64).map((_, i) => (i % 65 === 0 ? 1 : 0));
  const scheme = (outliers: { k?: number; v?: number }) => ({
    name: 'test',
    layer: (_layer: number, of: typeof shape, windows: { sink: number; recent: number }) => ({
      ...schemes.rotated({ keyBits: 2, valueBits: 2, without: ['mean'] }).layer(0, of, windows),
      k: { ...perToken, outliers: outliers.k ?? 0 },
      v: { ...perToken, outliers: outliers.v ?? 0 },
      basis: [0, 1].map(() => ({
        order: Uint8Array.from({ length: 64 }, (_, i) => i),
        metric: identity,
        feedback: new Float32Array(64 * 64),
        pivot: new Float32Array(64).fill(1),
      })),
    }),
  });
  expect(() => KvCache.createSync(backend, { ...options, scheme: scheme({ k: 1 }) })).toThrow(
    expect.objectContaining({
      code: UNSUPPORTED,
      message: expect.stringMatching(/error feedback/) as string,
    }) as Error,
  );
  using able = KvCache.createSync(backend, { ...options, scheme: scheme({ v: 2 }) });
  expect(able.plan()[0]!.values).toMatchObject({ outliers: 2 });
});

test.each([
  ['q8', schemes.q8()],
  ['outliers', schemeNamed('rotated-k2o2v2o1-no-mean')],
])('every flipped byte and every cut of a saved sequence is rejected or harmless: %s', (_, scheme) => {
  using small = KvCache.createSync(backend, {
    ...shape,
    kvHeads: 1,
    queryHeads: 1,
    scheme,
    memory: '1MiB',
    windows: { sink: 1, recent: 1 },
  });
  const one = small.sequence();
  one.appendSync(0, new Random(2).gaussians(64 * 4), new Random(3).gaussians(64 * 4));
  const bytes = one.saveSync();
  const used = small.stats().usedBytes;
  for (let i = 0; i < bytes.length; i += i < 300 || i > bytes.length - 100 ? 1 : 37) {
    const broken = Uint8Array.from(bytes);
    broken[i]! ^= 1 << (i % 8);
    expect(() => small.loadSync(broken)).toThrow(KvError);
    expect(() => small.loadSync(bytes.subarray(0, i))).toThrow(KvError);
  }
  expect(small.stats().usedBytes).toBe(used);
});
