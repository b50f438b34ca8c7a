/** The reference tests itself: bits, rounding, transforms, pages. Nothing of the project is imported. */
import { fromHalfBits, getHalf, MIN_HALF, roundToHalf, toHalfBits, toHalfBitsIeee } from '../reference/half';
import { decodeOutliers, encodeOutliers, outlierBytes, takeOutliers } from '../reference/outliers';
import { buildPage, codeBytes, getCode, keyShape, pageOffsets } from '../reference/pages';
import { putCode, valueShape } from '../reference/pages';
import {
  decodeGroup,
  decodeToken,
  quantiseBlock,
  quantiseGroup,
  quantiseToken,
  sum32,
} from '../reference/quantise';
import { applyRope, hadamard32, hadamard64, hadamardBlocks, normalise32 } from '../reference/transform';
import {
  reciprocal32,
  restoreKey64,
  ropeFrequencies,
  rotateBack32,
  rotateQuery,
} from '../reference/transform';
import { sequenceLam32, sequenceMean32, subtractMean32, transformKey32 } from '../reference/transform';
import { CODE_BITS, HEAD_DIMS, type Mode, type TensorSpec } from '../reference/types';
import { adversarialGroups, plantedTokens, poisonedBytes, Random } from '../support/random';

describe('half', () => {
  const view = new DataView(new ArrayBuffer(4));
  /** Independent decoder: the float32 pattern is written down bit by bit. */
  function viaFloat32(bits: number): number {
    const sign = (bits & 0x8000) << 16;
    let exponent = (bits >> 10) & 31;
    let fraction = bits & 1023;
    if (exponent === 31) view.setUint32(0, (sign | 0x7f800000 | (fraction << 13)) >>> 0);
    else if (exponent === 0 && fraction === 0) view.setUint32(0, sign >>> 0);
    else {
      if (exponent === 0) {
        exponent = 1;
        while (!(fraction & 1024)) [fraction, exponent] = [fraction << 1, exponent - 1];
      }
      view.setUint32(0, (sign | ((exponent + 112) << 23) | ((fraction & 1023) << 13)) >>> 0);
    }
    return view.getFloat32(0);
  }

  test('all 65,536 patterns decode like their float32 counterparts and come back', () => {
    const wrong: number[] = [];
    for (let bits = 0; bits < 65536; bits++) {
      const value = fromHalfBits(bits);
      const back = Number.isNaN(value) ? 0x7e00 : Number.isFinite(value) ? bits : bits - 1; // infinity saturates
      if (!Object.is(value, viaFloat32(bits)) || toHalfBits(value) !== back) wrong.push(bits);
      if (Math.abs(value) === Infinity && toHalfBitsIeee(value) !== bits) wrong.push(bits);
    }
    expect(wrong).toEqual([]);
  });

  test('rounds to nearest, ties to even, and saturates', () => {
    const wrong: number[] = [];
    for (let bits = 0; bits < 0x7bff; bits++) {
      const low = fromHalfBits(bits);
      const high = fromHalfBits(bits + 1);
      const tie = (low + high) / 2;
      const below = Math.fround(low + (high - low) * 0.49);
      const above = Math.fround(low + (high - low) * 0.51);
      const rounded = [tie, below, above, -above].map(toHalfBits);
      const expected = [bits + (bits % 2), bits, bits + 1, 0x8000 | (bits + 1)];
      if (rounded.some((value, i) => value !== expected[i])) wrong.push(bits);
    }
    expect(wrong).toEqual([]);
    expect([65519, 65520, 1e30, Infinity].map(toHalfBits)).toEqual([0x7bff, 0x7bff, 0x7bff, 0x7bff]);
    expect([65519.99, 65520, -1e30].map(toHalfBitsIeee)).toEqual([0x7bff, 0x7c00, 0xfc00]);
    expect([toHalfBits(MIN_HALF / 2), toHalfBits(MIN_HALF * 0.51), toHalfBits(-0)]).toEqual([0, 1, 0x8000]);
  });
});

describe('rounding a group', () => {
  const symmetric: Mode[] = ['midRise', 'zeroLevel', 'signedMax'];
  const modes: Mode[] = [...symmetric, 'asymmetric', 'hybrid', 'hybridReleased'];
  const needsTwo = new Set<Mode>(['zeroLevel', 'hybrid', 'hybridReleased']);
  const specs = modes.flatMap((mode) =>
    CODE_BITS.filter((bits) => bits > 1 || !needsTwo.has(mode)).map((bits): TensorSpec => ({
      bits,
      mode,
      group: 'channels32',
    })),
  );

  test.each(specs)('$mode, $bits bits: within half a step plus what the stored scale moves', (spec) => {
    const n = 2 ** spec.bits;
    for (const { name, values } of adversarialGroups(32)) {
      const { codes, scaleBits, zeroBits } = quantiseGroup(values, spec);
      const decoded = decodeGroup(codes, scaleBits, zeroBits, spec);
      const step = Math.abs(fromHalfBits(scaleBits));
      const skewed = zeroBits !== undefined;
      // Far from the codes' reach only when the scale was rounded down or saturated, or on the missing side of signedMax.
      const reach = decodeGroup([0, n - 1], scaleBits, zeroBits, spec);
      const levels = spec.mode === 'hybridReleased' && skewed ? n / 2 : n;
      const top = skewed ? reach[0]! + step * (levels - 1) : Math.max(...reach);
      const bottom = skewed ? reach[0]! : Math.min(...reach) + (symmetricAroundZero(spec) ? step : 0);
      values.forEach((x, i) => {
        const clipped = Math.min(Math.max(x, bottom), top);
        const slack = 2 ** -20 * Math.max(Math.abs(x), Math.abs(top), Math.abs(bottom));
        if (step === 0 && !skewed) expect(Math.abs(decoded[i]!)).toBe(0);
        else expect(Math.abs(clipped - decoded[i]!)).toBeLessThanOrEqual(step / 2 + slack);
        expect([name, codes[i]! >= 0 && codes[i]! < levels]).toEqual([name, true]);
        if (symmetricAroundZero(spec) && !skewed) expect(codes[i]).toBeGreaterThan(0);
      });
    }
  });

  function symmetricAroundZero({ mode }: TensorSpec): boolean {
    return mode === 'zeroLevel' || mode === 'hybrid' || mode === 'hybridReleased';
  }

  test('zeros, constants and subnormals are defined', () => {
    const zeros = new Float32Array(32);
    const group = (mode: Mode, values: Float32Array) =>
      quantiseGroup(values, { bits: 2, group: 'channels32', mode });
    expect(group('midRise', zeros)).toEqual({
      codes: new Uint8Array(32).fill(2),
      scaleBits: 0,
      zeroBits: undefined,
    });
    expect(group('zeroLevel', zeros).codes).toEqual(new Uint8Array(32).fill(2));
    expect(group('signedMax', zeros)).toMatchObject({ codes: new Uint8Array(32).fill(2), scaleBits: 0x8000 });
    const constant = new Float32Array(32).fill(roundToHalf(1.2345));
    expect(group('asymmetric', constant)).toMatchObject({ scaleBits: 0, zeroBits: toHalfBits(1.2345) });
    expect(group('hybrid', constant).zeroBits).toBeUndefined(); // ternary hits a constant exactly: a tie
    expect(
      group(
        'hybrid',
        constant.map((x) => x * 1.01),
      ),
    ).toMatchObject({ codes: new Uint8Array(32).fill(3) });
    expect(group('hybridReleased', constant)).toMatchObject({
      scaleBits: 0x8000,
      zeroBits: toHalfBits(1.2345),
    });
    expect(group('midRise', new Float32Array(32).fill(MIN_HALF)).scaleBits).toBe(1);
  });

  test('the clip search picks the least error, the first among equals', () => {
    const random = new Random(3);
    const spec: TensorSpec = { bits: 2, group: 'token', mode: 'midRise' };
    const error = (x: Float32Array, ratios: number[]) => {
      const { codes, scaleBits, zeroBits } = quantiseGroup(x, spec, { clipRatios: ratios });
      return decodeGroup(codes, scaleBits, zeroBits, spec).reduce((sum, v, i) => sum + (v - x[i]!) ** 2, 0);
    };
    for (let trial = 0; trial < 50; trial++) {
      const x = random.halves(64);
      const ratios = [1, 0.92, 0.85, 0.78, 0.7, 0.62];
      const least = Math.min(...ratios.map((ratio) => error(x, [ratio])));
      expect(error(x, ratios)).toBeLessThanOrEqual(least * (1 + 1e-5));
    }
    expect(quantiseGroup(new Float32Array(4).fill(2), spec, { clipRatios: [1, 1] }).scaleBits).toBe(
      toHalfBits(4 / 3),
    );
  });

  test('an unbiased scale makes <x, x̂> equal <x, x>', () => {
    const random = new Random(4);
    for (const mode of symmetric) {
      const spec: TensorSpec = { bits: 3, group: 'token', mode };
      const x = random.halves(128);
      const { codes, scaleBits, zeroBits } = quantiseGroup(x, spec, { unbiased: true });
      const dot = decodeGroup(codes, scaleBits, zeroBits, spec).reduce((sum, v, i) => sum + v * x[i]!, 0);
      const norm = x.reduce((sum, v) => sum + v * v, 0);
      expect(Math.abs(dot / norm - 1)).toBeLessThan(2 ** -11 + 2 ** -18);
    }
  });

  test('relative squared errors of the published table are met (methods: 200k groups of 32)', () => {
    const random = new Random(5);
    const relative = (mode: Mode, values: () => Float32Array) => {
      let error = 0;
      let energy = 0;
      for (let i = 0; i < 2000; i++) {
        const x = values();
        const { codes, scaleBits, zeroBits } = quantiseGroup(x, { bits: 2, group: 'channels32', mode });
        const decoded = decodeGroup(codes, scaleBits, zeroBits, { bits: 2, group: 'channels32', mode });
        x.forEach((v, c) => ((error += (v - decoded[c]!) ** 2), (energy += v * v)));
      }
      return error / energy;
    };
    const normal = () => random.halves(32);
    expect(Math.abs(relative('zeroLevel', normal) - 0.433)).toBeLessThan(0.01);
    expect(Math.abs(relative('asymmetric', normal) - 0.154)).toBeLessThan(0.006);
  });

  test('sum32 adds in 32 lanes and halves', () => {
    const terms = Array.from({ length: 80 }, (_, i) => i);
    expect(sum32(terms)).toBe((79 * 80) / 2);
    expect(sum32([1, ...new Array<number>(31).fill(0), 2 ** -24])).toBe(1); // same lane: rounded away
    expect(sum32([2 ** -24, ...new Array<number>(15).fill(0), 2 ** -24, 1])).toBe(1 + 2 ** -23); // halves first
  });
});

describe('transforms', () => {
  test('the Hadamard matrix is orthonormal, symmetric and its own inverse', () => {
    expect(HEAD_DIMS.map(hadamardBlocks)).toEqual([[64], [64, 16], [64, 32], [128], [256]]);
    for (const headDim of HEAD_DIMS) {
      const random = new Random(headDim);
      const x = random.gaussians(headDim);
      hadamard64(hadamard64(x)).forEach((v, i) => expect(v).toBeCloseTo(x[i]!, 12));
      const rows = Array.from({ length: headDim }, (_, i) =>
        hadamard64(Float64Array.from({ length: headDim }, (_, j) => Number(i === j))),
      );
      let worst = 0;
      rows.forEach((row, i) => {
        rows.slice(0, i + 1).forEach((other, j) => {
          const dot = row.reduce((sum, v, c) => sum + v * other[c]!, 0);
          worst = Math.max(worst, Math.abs(dot - Number(i === j)), Math.abs(row[j]! - other[i]!));
        });
      });
      expect(worst).toBeLessThan(1e-13);
      hadamard32(x).forEach((v, i) => expect(Math.abs(v - hadamard64(x)[i]!)).toBeLessThan(1e-5));
    }
    expect([...hadamard64([1, 2, 3, 4, ...new Array<number>(12).fill(0)])].slice(0, 4)).toEqual([
      2.5, -0.5, -1, 0,
    ]);
  });

  test.each(['adjacent', 'half'] as const)('rotating a RoPE key by -P leaves RoPE of p - P: %s', (layout) => {
    const random = new Random(6);
    const rope = { theta: ropeFrequencies(48, 10000), layout, rotaryDims: 48 };
    const raw = random.gaussians(64);
    for (const [p, P] of [
      [7, 4],
      [1000, 896],
      [100_003, 99_968],
      [1_000_063, 1_000_000],
    ] as const) {
      const expected = applyRope(raw, p - P, rope);
      const key = applyRope(raw, p, rope);
      const back = rotateQuery(key, P, rope.theta, layout, 48);
      const back32 = rotateBack32(Float32Array.from(key), P, rope);
      for (let c = 0; c < 64; c++) {
        expect(back[c]).toBeCloseTo(expected[c]!, 9);
        expect(back32[c]).toBeCloseTo(expected[c]!, 5);
        if (c >= 48) expect(back32[c]).toBe(raw[c]);
      }
    }
  });

  test('restoring undoes the transform, and statistics follow the tokens', () => {
    const random = new Random(7);
    const tokens = plantedTokens(random, 20, 96);
    const mu = sequenceMean32(tokens);
    const lam = sequenceLam32(tokens);
    const column = tokens.map((token) => token[5]!);
    expect(mu[5]).toBeCloseTo(column.reduce((a, b) => a + b) / 20, 4);
    expect(lam[5]! ** 2).toBeCloseTo(Math.max(...column.map(Math.abs)), 4);
    expect(sequenceLam32([new Float32Array(4)])).toEqual(new Float32Array(4).fill(2 ** -10));
    const rope = { theta: ropeFrequencies(96, 10000), layout: 'half' as const, rotaryDims: 96 };
    const steps = { rotation: { P: 132, rope }, mu, lam, hadamard: true };
    const key = transformKey32(tokens[3]!, steps);
    expect(key).toEqual(
      hadamard32(normalise32(subtractMean32(rotateBack32(tokens[3]!, 132, rope), mu), reciprocal32(lam))),
    );
    restoreKey64(key, steps).forEach((v, c) => expect(v).toBeCloseTo(tokens[3]![c]!, 3));
  });
});

describe('pages', () => {
  test.each(CODE_BITS)('%i-bit codes: every place is used once and every code comes back', (bits) => {
    for (const headDim of HEAD_DIMS)
      for (const shape of [keyShape(headDim), valueShape(headDim)]) {
        const random = new Random(bits * 1000 + headDim);
        const bytes = poisonedBytes(codeBytes(bits, shape));
        const codes = Uint8Array.from({ length: shape.rows * shape.elements }, () => random.below(2 ** bits));
        codes.forEach((code, i) => {
          putCode(bytes, bits, shape, Math.floor(i / shape.elements), i % shape.elements, code);
        });
        const read = codes.map((_, i) =>
          getCode(bytes, bits, shape, Math.floor(i / shape.elements), i % shape.elements),
        );
        expect(read).toEqual(codes);
      }
  });

  test('codes lie where the table says', () => {
    const place = (bits: 1 | 2 | 3 | 4 | 8, row: number, element: number, code: number) => {
      const bytes = new Uint8Array(codeBytes(bits, keyShape(64)));
      putCode(bytes, bits, keyShape(64), row, element, code);
      return [...bytes].flatMap((value, at) => (value === 0 ? [] : [[at, value]]));
    };
    expect(place(2, 33, 6, 3)).toEqual([[4 * (1 * 32 + 1) + 2, 3 << 2]]); // class 1, word 1, quad 1, byte 2
    expect(place(1, 127, 63, 1)).toEqual([[4 * (15 * 16 + 15) + 3, 128]]);
    expect(place(4, 64, 0, 9)).toEqual([[0, 9 << 4]]);
    expect(place(8, 127, 1, 200)).toEqual([[4 * 127 + 1, 200]]);
    expect(place(3, 5 * 16 + 2, 0, 7)).toEqual([[4 * (2 * 16 + 2), 7 << 3]]);
    expect(place(3, 6 * 16, 4, 7)).toEqual([
      [4 * (3 * 16), 3 << 6],
      [4 * (5 * 16), 1 << 6],
    ]);
    expect(place(3, 7 * 16, 4, 5)).toEqual([
      [4 * (4 * 16), 2 << 6],
      [4 * (5 * 16), 1 << 7],
    ]);
  });

  test('a page holds tokens and blocks, zero points dense or compact', () => {
    const random = new Random(8);
    const headDim = 80;
    const kSpec: TensorSpec = { bits: 3, group: 'channels32', mode: 'asymmetric' };
    const vSpec: TensorSpec = { bits: 2, group: 'tokens32', mode: 'hybrid' };
    const kTokens = plantedTokens(random, 40, headDim).map((x) => quantiseToken(x, kSpec));
    const block = quantiseBlock(plantedTokens(random, 32, headDim), vSpec);
    const page = buildPage({ kSpec, vSpec, headDim, kTokens, vBlocks: [block] });
    const at = pageOffsets({ kSpec, vSpec, headDim });
    expect(at).toMatchObject({ kCodes: { offset: 0, length: 3840 }, kScales: { offset: 3840, length: 768 } });
    expect(at).toMatchObject({ kZeros: { offset: 4608 }, vCodes: { offset: 5376, length: 2560 } });
    expect(at).toMatchObject({ vScales: { offset: 7936, length: 640 }, vZeros: { length: 0 }, bytes: 8576 });
    expect(getCode(page.bytes, 3, keyShape(headDim), 39, 77)).toBe(kTokens[39]!.codes[77]);
    expect(getHalf(page.bytes.subarray(at.kZeros.offset), 2 * 128 + 39)).toBe(kTokens[39]!.zeroBits[2]);
    expect(getCode(page.bytes.subarray(at.vCodes.offset), 2, valueShape(headDim), 77, 31)).toBe(
      block.codes[31 * headDim + 77],
    );
    expect(getHalf(page.bytes.subarray(at.vScales.offset), 77)).toBe(block.scaleBits[77]);
    expect(page.vZeros).toEqual(block.zeroBits.filter((bits) => bits !== undefined));
    expect([page.kZeros.length, page.vZeros.length > 0]).toEqual([0, true]);
  });

  test('binary16 tensors are row-major and have no scales', () => {
    const spec: TensorSpec = { bits: 16, group: 'token', mode: 'midRise' };
    const tokens = plantedTokens(new Random(9), 128, 64).map((x) => quantiseToken(x, spec));
    const page = buildPage({ kSpec: spec, vSpec: spec, headDim: 64, kTokens: tokens, vTokens: tokens });
    expect(page.bytes.length).toBe(2 * 128 * 64 * 2);
    expect(getHalf(page.bytes, 100 * 64 + 63)).toBe(tokens[100]!.codes[63]);
    expect(page.bytes.subarray(0, 16384)).toEqual(page.bytes.subarray(16384));
  });

  test('outliers are the largest of a token, ties to the lower channel, drawn into the range of their group', () => {
    const x = new Float32Array(64);
    [x[3], x[10], x[20], x[30], x[40], x[50]] = [5, -5, 4, -1, 5, 0.5];
    const whole = [{ start: 0, end: 64 }];
    const halves = [
      { start: 0, end: 32 },
      { start: 32, end: 64 },
    ];
    const taken = (count: number, groups: typeof whole) => {
      const { channels, rest } = takeOutliers(x, count, groups);
      return [channels, [3, 10, 20, 30, 40, 50].map((c) => rest[c])];
    };
    expect(taken(1, whole)).toEqual([[3], [5, -5, 4, -1, 5, 0.5]]); // a tie: clamping does nothing
    expect(taken(2, whole)).toEqual([
      [3, 10],
      [5, -1, 4, -1, 5, 0.5],
    ]);
    expect(taken(3, halves)).toEqual([
      [3, 10, 40],
      [4, -1, 4, -1, 0.5, 0.5],
    ]);
    const zeros = takeOutliers(new Float32Array(64).fill(-0), 3, whole);
    expect(zeros.channels).toEqual([0, 1, 2]);
    expect([...zeros.rest.subarray(0, 4)].map((zero) => Object.is(zero, -0))).toEqual([
      ...[false, false, false],
      true,
    ]);
  });

  test.each(['midRise', 'asymmetric', 'hybrid'] as const)('outliers come back nearly whole: %s', (mode) => {
    const x = new Random(5).gaussians(128);
    [x[7], x[90]] = [40, -31];
    const spec: TensorSpec = { bits: 2, group: 'channels32', mode, outliers: 2 };
    const token = quantiseToken(x, spec);
    expect(token.outliers!.map(({ channel }) => channel)).toEqual([7, 90]);
    const values = decodeToken(token, spec);
    for (const c of [7, 90])
      expect(Math.abs(values[c]! - x[c]!)).toBeLessThanOrEqual(2 ** -11 * Math.abs(x[c]!));
    const { outliers: _, ...dense } = spec;
    const error = (decoded: Float64Array) => decoded.reduce((sum, value, c) => sum + (value - x[c]!) ** 2, 0);
    expect(error(values)).toBeLessThan(error(decodeToken(quantiseToken(x, dense), dense)));
  });

  test.each([0, 1, 255, 256, 700])('outlier rows come back: capacity %i', (capacity) => {
    const random = new Random(capacity);
    const rows = Array.from({ length: 128 }, () => [] as { channel: number; valueBits: number }[]);
    for (let i = 0; i < capacity; i++) {
      const row = random.pick(rows);
      const channel = (row.at(-1)?.channel ?? -1) + 1 + random.below(4);
      if (channel < 256) row.push({ channel, valueBits: random.below(65536) });
    }
    const bytes = encodeOutliers(rows, capacity);
    expect(bytes.length).toBe(outlierBytes(capacity));
    expect(decodeOutliers(bytes, capacity)).toEqual(rows);
    if (capacity === 1)
      expect(() => encodeOutliers([[...rows.flat(), { channel: 255, valueBits: 0 }]], 0)).toThrow();
  });
});
