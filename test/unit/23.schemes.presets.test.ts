import { builtinSchemes, schemeNamed, schemes, type Moments } from '../../lib/schemes/index';
import { type CacheShape, type Scheme } from '../../lib/schemes/types';
import { plantedTokens, Random } from '../support/random';
import { sampleMoments } from '../reference/basis';
import { failure } from '../support/failures';

const windows = { sink: 32, recent: 96 };
const shape: CacheShape = {
  layers: 2,
  queryHeads: 4,
  kvHeads: 2,
  headDim: 64,
  rope: { base: 10000, layout: 'half' },
};
const layerOf = (scheme: Scheme) => scheme.layer(0, shape, windows);

const random = new Random(3);
const head = () => {
  const { keyMean, keySecond, querySecond } = sampleMoments(
    plantedTokens(random, 200, 64),
    plantedTokens(random, 200, 64),
  );
  return { keyMean, keyMoment: keySecond, queryMoment: querySecond };
};
const moments: Moments = {
  kvHeads: 2,
  headDim: 64,
  layers: new Map([0, 1].map((i) => [i, [head(), head()]])),
};
const bits = { keyBits: 2, valueBits: 2 } as const;

test('every built-in scheme has its own name, says what it is, and keeps the windows given', () => {
  const made = builtinSchemes.map((scheme) => scheme.create(moments));
  expect(made.map((scheme) => scheme.name)).toEqual(builtinSchemes.map((scheme) => scheme.name));
  expect(new Set(made.map((scheme) => scheme.name)).size).toBe(made.length);
  for (const scheme of made) {
    expect(scheme.describe()).toMatch(/\w/);
    expect(layerOf(scheme)).toMatchObject({ ...windows, k: scheme.key, v: scheme.value });
    expect(schemeNamed(scheme.name, moments).describe()).toBe(scheme.describe());
  }
});

test('bits per value count codes, scales and zero points', () => {
  const price = (name: string, headDim = 64) => schemeNamed(name, moments).bitsPerValue(headDim);
  expect(price('fp16')).toBe(16);
  expect(price('q8')).toBe(8.5);
  expect(price('q4_0')).toBe(4.5);
  expect(price('innerq-base')).toBe(3.5);
  expect(price('innerq-small')).toBe(3);
  expect(price('rotated-k2v2')).toBe(2.25);
  expect(price('rotated-k2v2', 128)).toBe(2.125);
  expect(price('calibrated-k2v1')).toBe(1.75);
  expect(price('q4_0', 80)).toBe(4 + (3 * 16) / 80); // the last group is short
  expect(schemes.innerq({ keyMode: 'asymmetric', valueMode: 'asymmetric' }).bitsPerValue(64)).toBe(4);
  expect(schemes.rotated({ keyBits: 16, valueBits: 2 }).bitsPerValue(64)).toBe((16 + 2.25) / 2);
});

test('InnerQ: groups along the reduction dimension, presets, and the quantiser of the released code', () => {
  expect(layerOf(schemes.innerq())).toMatchObject({
    k: { bits: 3, group: 'channels32', mode: 'zeroLevel' },
    v: { bits: 3, group: 'tokens32', mode: 'zeroLevel' },
    onlineLambda: true,
    statTokens: 64,
    onlineMean: false,
    hadamardK: false,
    releasedWindows: false,
  });
  expect(schemes.innerq({ preset: 'small' }).value).toMatchObject({ bits: 2, mode: 'zeroLevel' });
  expect(schemes.innerq({ preset: 'hybrid' }).value).toMatchObject({ bits: 2, mode: 'hybrid' });
  expect(schemes.innerq({ preset: 'hybrid', compat: 'released' }).value.mode).toBe('hybridReleased');
  expect(layerOf(schemes.innerq({ compat: 'released', releasedWindows: true })).releasedWindows).toBe(true);
  const custom = schemes.innerq({
    keyBits: 4,
    valueBits: 2,
    valueMode: 'hybrid',
    group: 64,
    keyNormalisation: false,
  });
  expect(custom.name).toBe('innerq-k4v2-hybrid-no-lambda');
  expect(schemeNamed(custom.name).key.group).toBe('channels32');
  expect(layerOf(schemeNamed('innerq-k3v2-asymmetric'))).toMatchObject({
    onlineLambda: true,
    v: { mode: 'asymmetric' },
  });
  expect(custom.key).toEqual({ bits: 4, group: 'channels64', mode: 'zeroLevel' });
  expect(layerOf(custom)).toMatchObject({ onlineLambda: false, statTokens: 0 });
});

test('rotated: a basis without calibration', () => {
  expect(layerOf(schemes.rotated(bits))).toMatchObject({
    k: { bits: 2, group: 'token', mode: 'midRise' },
    hadamardK: true,
    hadamardV: true,
    onlineMean: true,
    statTokens: 128,
    blockTokens: 0,
    basis: null,
  });
  const values = layerOf(schemes.rotated({ keyBits: 16, valueBits: 2 }));
  expect(values).toMatchObject({ hadamardK: false, onlineMean: false, hadamardV: true, k: { bits: 16 } });
});

test('calibrated: one basis per KV head, derived once', () => {
  const scheme = schemes.calibrated(moments, bits);
  const layer = scheme.layer(1, shape, windows);
  expect(layer).toMatchObject({ blockTokens: 128, onlineMean: false, unbiasedK: true, unbiasedV: true });
  expect(layer.basis).toHaveLength(2);
  expect(layer.basis![0]!.metric).toHaveLength(64 * 64);
  expect(scheme.layer(1, shape, windows).basis).toBe(layer.basis);
  const turned = scheme.layer(1, { ...shape, rope: { base: 10000, layout: 'adjacent' } }, windows);
  expect(turned.basis![0]!.mean).not.toEqual(layer.basis![0]!.mean);
  const wide = schemes
    .calibrated(moments, { ...bits, context: 131072, blockTokens: 256 })
    .layer(1, shape, windows);
  expect(wide.blockTokens).toBe(256);
  expect(wide.basis![0]!.metric).not.toEqual(layer.basis![0]!.metric);
  expect(layerOf(schemes.calibrated(moments, { keyBits: 16, valueBits: 4 }))).toMatchObject({
    basis: null,
    blockTokens: 0,
  });
});

describe('ablation: a part that is left out is absent, and what follows is derived without it', () => {
  const full = layerOf(schemes.calibrated(moments, bits));
  const without = (part: string) => layerOf(schemeNamed(`calibrated-k2v2-no-${part}`, moments));
  const firstBasis = (part: string) => without(part).basis![0]!;

  test.each([
    ['clip', { clipK: [1], clipV: [] }],
    ['unbiased', { unbiasedK: false, unbiasedV: false }],
  ])('calibrated without %s', (part, changed) => {
    expect(without(part)).toEqual({ ...full, ...changed });
  });

  test('calibrated without blocks: keys are averaged over the context like queries', () => {
    const changed = without('blocks');
    expect(changed).toEqual({ ...full, blockTokens: 0, basis: changed.basis });
    const spread = layerOf(schemes.calibrated(moments, { ...bits, blockTokens: 8192 }));
    expect(changed.basis).toEqual(spread.basis);
  });

  test('calibrated without feedback: the same transform, plain rounding', () => {
    const { mean, lam } = full.basis![0]!;
    expect(firstBasis('feedback')).toEqual({ mean, lam });
  });

  test('calibrated without lambda or rotation: another metric', () => {
    expect(firstBasis('lambda').lam).toBeUndefined();
    expect(firstBasis('lambda').metric).not.toEqual(full.basis![0]!.metric);
    expect(without('rotation')).toMatchObject({ hadamardK: false, hadamardV: false });
    expect(firstBasis('rotation').metric).not.toEqual(full.basis![0]!.metric);
    expect(firstBasis('rotation').lam).toEqual(full.basis![0]!.lam);
  });

  test('calibrated without mean: normalised by the second moment', () => {
    const { mean, lam } = firstBasis('mean');
    expect(mean).toBeUndefined();
    lam!.forEach((value, c) => expect(value).toBeGreaterThan(full.basis![0]!.lam![c]!));
  });

  test('rotated', () => {
    const all = layerOf(schemes.rotated(bits));
    const bare = layerOf(schemeNamed('rotated-k2v2-no-mean-no-rotation-no-clip-no-unbiased'));
    expect(bare).toEqual({
      ...all,
      ...{ onlineMean: false, statTokens: 0, hadamardK: false, hadamardV: false },
      ...{ clipK: [], clipV: [], unbiasedV: false },
    });
  });

  test('names say what is missing, and mean what they say', () => {
    const scheme = schemes.calibrated(moments, { ...bits, without: ['feedback', 'clip'] });
    expect(scheme.name).toBe('calibrated-k2v2-no-feedback-no-clip');
    expect(layerOf(schemeNamed(scheme.name, moments))).toEqual(layerOf(scheme));
  });
});

test('outliers: by option and by name, counted, and only where there can be any', () => {
  const both = schemes.rotated({ ...bits, keyOutliers: 1, valueOutliers: 8 });
  expect(both.name).toBe('rotated-k2o1v2o8');
  expect([both.key.outliers, both.value.outliers]).toEqual([1, 8]);
  expect(schemes.rotated({ ...bits, keyOutliers: 0 }).key).toEqual(schemes.rotated(bits).key);
  const names = [
    'rotated-k3o2v2-no-mean',
    'rotated-k2v4o1',
    'calibrated-k2v2o3',
    'innerq-k3o1v2-hybrid-no-lambda',
  ];
  for (const name of names) expect(schemeNamed(name, moments).name).toBe(name);
  expect(layerOf(schemeNamed('innerq-k3o1v2-hybrid'))).toMatchObject({
    k: { bits: 3, group: 'channels32', outliers: 1 },
    v: { bits: 2, group: 'tokens32' },
  });
  const price = (name: string) => schemeNamed(name, moments).bitsPerValue(128);
  expect(price('rotated-k2o1v2')).toBe(2.125 + (129 + 3 * 128) / 128 / 16 / 2);
  expect(price('rotated-k2v2o3')).toBe(2.125 + (2 * 129 + 9 * 128) / 128 / 16 / 2);
});

test('presets: calibrated with moments, rotated without, by name too', () => {
  for (const size of [2, 3, 4] as const) {
    const [plain, tuned] = [schemes.preset(size), schemes.preset(size, moments)];
    expect(plain.name).toMatch(/^rotated-/);
    expect(tuned.name).toMatch(/^calibrated-/);
    expect(Math.floor(plain.bitsPerValue(64))).toBe(size);
    expect(Math.floor(tuned.bitsPerValue(64))).toBe(size);
    expect(schemeNamed(`${size}bit`).name).toBe(plain.name);
    expect(schemeNamed(`${size}bit`, moments).name).toBe(tuned.name);
  }
  expect(schemes.preset(3).name).toBe('rotated-k4v2');
  expect(schemes.preset(3, moments).name).toBe('calibrated-k3v3');
});

test('clip searches respect the limit of eight ratios', () => {
  for (const scheme of builtinSchemes) {
    const { clipK, clipV } = layerOf(scheme.create(moments));
    expect(Math.max(clipK.length, clipV.length)).toBeLessThanOrEqual(8);
  }
});

test.each<[string, () => unknown, string]>([
  ['a misspelt option', () => schemes.rotated({ ...bits, keybits: 2 } as never), 'no option "keybits"'],
  ['no options', () => schemes.rotated(undefined as never), 'must be an object'],
  ['five bits', () => schemes.rotated({ keyBits: 5 as never, valueBits: 2 }), 'keyBits'],
  ['1-bit keys', () => schemes.calibrated(moments, { keyBits: 1 as never, valueBits: 2 }), 'keyBits'],
  ['bits as text', () => schemes.rotated({ keyBits: '2' as never, valueBits: 2 }), 'keyBits'],
  ['1-bit InnerQ values', () => schemes.innerq({ valueBits: 1 as never }), 'valueBits'],
  ['an unknown preset', () => schemes.innerq({ preset: 'large' as never }), 'preset'],
  ['an unknown mode', () => schemes.innerq({ valueMode: 'toString' as never }), 'valueMode'],
  ['a group of 16', () => schemes.innerq({ group: 16 as never }), 'group'],
  ['statistics of no token', () => schemes.rotated({ ...bits, statTokens: 0 }), 'statTokens'],
  ['blocks of 100', () => schemes.calibrated(moments, { ...bits, blockTokens: 200 }), 'multiple of 128'],
  ['blocks of 0', () => schemes.calibrated(moments, { ...bits, blockTokens: 0 }), 'blockTokens'],
  ['an endless context', () => schemes.calibrated(moments, { ...bits, context: Infinity }), 'context'],
  ['a file that is not there', () => schemes.calibrated('no-such-file', bits), 'no-such-file'],
  [
    'moments of two sizes',
    () => schemes.calibrated({ ...moments, headDim: 32 }, bits),
    'no calibration moments',
  ],
  ['an unknown name', () => schemeNamed('rotated-2'), 'There are fp16, q8,'],
  ['a preset that is none', () => schemes.preset(5 as never), 'bits of schemes.preset'],
  ['the name of one that is none', () => schemeNamed('1bit'), 'There are fp16, q8,'],
  ['an unknown part', () => schemeNamed('calibrated-k2v2-no-sinks', moments), 'without'],
  ['a part of another scheme', () => schemeNamed('rotated-k2v2-no-feedback'), 'without'],
  ['a part twice', () => schemeNamed('rotated-k2v2-no-clip-no-clip'), 'There are fp16, q8,'],
  ['something else behind the bits', () => schemeNamed('rotated-k2v2-fast'), 'There are fp16, q8,'],
  ['InnerQ without a mode', () => schemeNamed('innerq-k3v3'), 'There are fp16, q8,'],
  ['parts that are no list', () => schemes.rotated({ ...bits, without: 'clip' as never }), 'array'],
  ['bits in a name', () => schemeNamed('rotated-k7v2'), 'keyBits'],
  ['nine outliers', () => schemes.rotated({ ...bits, keyOutliers: 9 }), 'keyOutliers'],
  ['half an outlier', () => schemes.calibrated(moments, { ...bits, valueOutliers: 0.5 }), 'valueOutliers'],
  ['outliers of none', () => schemes.innerq({ keyOutliers: -1 }), 'keyOutliers'],
  ['nine outliers in a name', () => schemeNamed('rotated-k2o9v2'), 'There are fp16, q8,'],
  ['outliers of 32 values', () => schemeNamed('innerq-k3v2o1-hybrid'), 'no option "valueOutliers"'],
  ['no moments', () => schemeNamed('calibrated-k4v2'), 'needs calibration moments'],
  ['a layer without moments', () => schemes.calibrated(moments, bits).layer(2, shape, windows), 'layer 2'],
  [
    'other heads',
    () => schemes.calibrated(moments, bits).layer(0, { ...shape, kvHeads: 4 }, windows),
    '2 KV heads',
  ],
  [
    'no rope',
    () =>
      schemes
        .calibrated(moments, bits)
        .layer(0, { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 64 }, windows),
    'rope',
  ],
])('%s is an invalid argument', (_, act, message) => {
  expect(act).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', message));
});
