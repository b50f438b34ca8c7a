/** The reference tests itself: the cache model, attention and its tolerances. */
import { attendHead, attendLayer, dot, levelsOf, meetKey } from '../reference/attention';
import { ReferenceHead, type HeadScheme } from '../reference/cache';
import { fromHalfBits, toHalfBits } from '../reference/half';
import { buildPage, getCode, keyShape } from '../reference/pages';
import { attentionTolerance, INTEGER_RANGE } from '../reference/tolerance';
import { hadamard64, sequenceMean32 } from '../reference/transform';
import { hasZeroPoints, PAGE_TOKENS, type TensorSpec } from '../reference/types';
import { calibrated, filled, INNERQ, ROTATED } from '../support/heads';

function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  return Math.max(...Array.from(a, (value, i) => Math.abs(value - b[i]!)));
}

const count = (head: ReferenceHead, tensor: 'key' | 'value') =>
  head.tokens.filter((token) => token[tensor].kind !== 'window').length;

describe('the cache model', () => {
  test('windows follow the rule at every length', () => {
    const { keys, values } = filled(INNERQ, 160);
    const head = new ReferenceHead(INNERQ);
    keys.forEach((key, t) => {
      head.append(key, values[t]!);
      const rest = Math.max(0, t + 1 - 4 - 20);
      const waits = t + 1 < 40;
      expect(count(head, 'key')).toBe(waits ? 0 : rest);
      expect(count(head, 'value')).toBe(waits ? 0 : Math.floor(rest / 32) * 32);
    });
    expect(head.tokens.slice(0, 4).every((token) => token.key.kind === 'window')).toBe(true);
  });

  test('statistics come from exactly the first statTokens tokens', () => {
    const { head, keys } = filled(ROTATED, 60);
    expect(head.statistics!.mu).toEqual(sequenceMean32(keys.slice(0, 24)));
    expect(filled(ROTATED, 23).head.statistics).toBeUndefined();
    const early = filled({ ...ROTATED, statTokens: 10 }, 60);
    expect(early.head.statistics!.mu).toEqual(sequenceMean32(early.keys.slice(0, 10)));
  });

  test('truncate drops keys singly, returns cut value blocks to the window, and forgets', () => {
    const { head, keys, values } = filled(INNERQ, 150);
    expect([count(head, 'key'), count(head, 'value')]).toEqual([126, 96]);
    const block = head.tokens
      .filter(({ position }) => position >= 68 && position < 80)
      .map((token) => head.value(token));
    head.truncate(80);
    expect([head.length, head.tokens.length, count(head, 'key'), count(head, 'value')]).toEqual([
      80, 80, 76, 64,
    ]);
    head.tokens.slice(68).forEach((token, i) => {
      expect([...head.value(token)]).toEqual([...block[i]!].map((value) => fromHalfBits(toHalfBits(value))));
    });
    for (let t = 80; t < 120; t++) head.append(keys[t]!, values[t]!);
    expect([count(head, 'key'), count(head, 'value')]).toEqual([96, 96]);
    head.truncate(5);
    expect(head.statistics).toBeDefined();
    head.truncate(4);
    expect([head.statistics, head.tokens.length]).toEqual([undefined, 4]);
    for (let t = 4; t < 150; t++) head.append(keys[t]!, values[t]!);
    expect(head.tokens).toEqual(filled(INNERQ, 150).head.tokens);
  });

  test('truncating and appending the same tokens again changes nothing for per-token schemes', () => {
    const { head, keys, values } = filled(ROTATED, 90);
    const before = [...head.tokens];
    head.truncate(70);
    for (let t = 70; t < 90; t++) head.append(keys[t]!, values[t]!);
    expect(before.map((token) => token.position)).toEqual(head.tokens.map((token) => token.position));
    before.slice(0, 70).forEach((token, t) => expect(head.tokens[t]).toBe(token));
  });

  test('replace, remove and fork', () => {
    const { head, keys, values } = filled(ROTATED, 60);
    const twin = head.fork();
    head.replace(30, keys[2]!, values[2]!);
    head.replace(59, keys[2]!, values[2]!);
    head.replace(30, keys[30]!, values[30]!);
    expect(head.tokens[30]).toEqual(twin.tokens[30]);
    expect(head.value(head.tokens[59]!)).toEqual(Float64Array.from(values[2]!));
    head.remove(31);
    expect([head.tokens.length, head.length, twin.tokens.length]).toEqual([59, 60, 60]);
    head.append(keys[0]!, values[0]!);
    expect([head.tokens.at(-1)!.position, count(head, 'key')]).toEqual([60, 44]);
    for (let position = 4; position < 44; position++) if (position !== 31) head.remove(position);
    head.append(keys[1]!, values[1]!); // fewer than statTokens are left, yet the window flushes
    expect([head.tokens.length, count(head, 'key')]).toEqual([22, 6]);
    const shared = filled(INNERQ, 100).head;
    expect(() => shared.remove(50)).toThrow('share');
    expect(() => shared.replace(5, keys[0]!, values[0]!)).toThrow('shares');
    expect(() =>
      shared.append(
        keys[0]!.map(() => 70000),
        values[0]!,
      ),
    ).toThrow('finite');
    expect(() =>
      shared.append(
        keys[0]!,
        values[0]!.map(() => NaN),
      ),
    ).toThrow('finite');
  });

  test('blocks start behind the sink', () => {
    const head = new ReferenceHead(calibrated('half'));
    expect([4, 131, 132, 259, 260].map((position) => head.blockPosition(position))).toEqual([
      4, 4, 132, 132, 260,
    ]);
    expect(new ReferenceHead(ROTATED).blockPosition(200)).toBeUndefined();
  });

  test('pages hold what the model holds', () => {
    const { head } = filled(INNERQ, 200);
    const page = buildPage(head.page(1));
    const token = head.tokens.find(({ position }) => position === 4 + 128 + 9)!;
    const code = token.key.kind === 'token' ? token.key.token.codes[40] : -1;
    expect(getCode(page.bytes, 3, keyShape(64), 9, 40)).toBe(code);
    expect(buildPage(head.page(0)).vZeros.length).toBeGreaterThan(0);
  });
});

describe('attention', () => {
  test('over 16-bit tokens it is the plain softmax', () => {
    const spec: TensorSpec = { bits: 16, group: 'token', mode: 'midRise' };
    const { head, keys, values, random } = filled(
      { headDim: 64, key: spec, value: spec, sink: 1, recent: 2 },
      33,
    );
    expect(count(head, 'key')).toBe(30);
    const q = random.gaussians(64);
    const logits = keys.map((key) => dot(q, key) / 8);
    const sum = logits.reduce((total, logit) => total + Math.exp(logit), 0);
    const { out, lse, probabilities } = attendHead(q, head, 32);
    for (let c = 0; c < 64; c++) {
      const expected = values.reduce(
        (total, value, j) => total + (Math.exp(logits[j]!) / sum) * value[c]!,
        0,
      );
      expect(out[c]).toBeCloseTo(expected, 12);
    }
    expect(lse).toBeCloseTo(Math.log(sum), 12);
    expect(probabilities.reduce((a, b) => a + b)).toBeCloseTo(1, 14);
  });

  test.each(['adjacent', 'half'] as const)(
    'dequantised keys and transformed queries give one logit: %s',
    (layout) => {
      for (const scheme of [calibrated(layout), calibrated(layout, 80), INNERQ, ROTATED]) {
        const { head, random } = filled(scheme, 300);
        const q = random.gaussians(scheme.headDim);
        for (const token of head.tokens) {
          if (token.key.kind === 'window') continue;
          const { query, constant } = meetKey(q, head, token);
          expect(dot(query, head.storedKey(token)) + constant).toBeCloseTo(dot(q, head.key(token)), 8);
        }
      }
    },
  );

  test('decoded keys and values are near the originals', () => {
    const scheme = {
      ...calibrated('half'),
      key: { ...ROTATED.key, bits: 8 as const },
      value: { ...ROTATED.key, bits: 8 as const },
    };
    const { head, keys, values } = filled(scheme, 300);
    head.tokens.forEach((token, t) => {
      expect(largestDifference(head.value(token), values[t]!)).toBeLessThan(0.4);
      expect(largestDifference(head.key(token), keys[t]!)).toBeLessThan(2);
    });
  });

  test('GQA, causal order, sliding window and softcap', () => {
    const { head, random } = filled(ROTATED, 50);
    const other = filled(ROTATED, 50, 99).head;
    const q = random.gaussians(3 * 4 * 64);
    const options = { softcap: 5, slidingWindow: 7 };
    const layer = attendLayer(q, [head, other], { queries: 3, queryHeads: 4, ...options });
    for (let i = 0; i < 3; i++)
      for (let h = 0; h < 4; h++) {
        const at = (i * 4 + h) * 64;
        const single = attendHead(q.subarray(at, at + 64), h < 2 ? head : other, 47 + i, options);
        expect(layer.out.subarray(at, at + 64)).toEqual(single.out);
        expect(single.tokens.map(({ position }) => position)).toEqual(
          [41, 42, 43, 44, 45, 46, 47].map((j) => j + i),
        );
        expect(Math.max(...single.logits.map(Math.abs))).toBeLessThan(5);
      }
    expect([...layer.mass[0]!.values()].reduce((a, b) => a + b)).toBeCloseTo(6, 12);
    expect(attendHead(q.subarray(0, 64), new ReferenceHead(ROTATED), 0)).toMatchObject({ lse: -Infinity });
  });
});

/** The arithmetic that the tolerances describe, in float32 with 16-bit integers: queries per vector, weights per page. */
function imitation(q: Float32Array, head: ReferenceHead): Float64Array {
  const f = Math.fround;
  const dim = q.length;
  const largest = (x: ArrayLike<number>) => Array.from(x).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  const integers = (x: ArrayLike<number>) => {
    const step = f(largest(x) / INTEGER_RANGE);
    return { step, values: Float64Array.from(x, (value) => (step === 0 ? 0 : Math.round(f(value / step)))) };
  };
  const logits = head.tokens.map((token) => {
    if (token.key.kind === 'window') return f(dot(q, head.storedKey(token)) / Math.sqrt(dim));
    const { query, constant } = meetKey(q, head, token);
    const { step, values } = integers(query.map(f));
    return f(f(dot(values, head.storedKey(token))) * step + constant) / Math.sqrt(dim);
  });
  const top = Math.max(...logits);
  const weights = logits.map((logit) => f(Math.exp(f(logit - top))));
  const sum = weights.reduce((a, b) => f(a + b), 0);
  const raw = new Float64Array(dim);
  const stored = new Float64Array(dim);
  const pages = new Map<number, number[]>();
  head.tokens.forEach((token, j) => {
    if (token.value.kind === 'window')
      head.storedValue(token).forEach((value, c) => (raw[c]! += weights[j]! * value));
    else {
      const page = Math.floor(head.tokenIndex(token.position) / PAGE_TOKENS);
      pages.set(page, [...(pages.get(page) ?? []), j]);
    }
  });
  const folds = head.scheme.value.group !== 'tokens32';
  for (const members of pages.values()) {
    const levels = members.map((j) => levelsOf(head.tokens[j]!.value, head.scheme.value, dim));
    for (let c = 0; c < dim; c++) {
      const { step, values } = integers(
        members.map((j, i) => f(weights[j]! * (folds ? levels[i]!.scale[c]! : 1))),
      );
      levels.forEach(({ scale, code, offset, zero }, i) => {
        const level = code[c]! - offset[c]!;
        const bare = folds && hasZeroPoints(head.scheme.value.mode);
        stored[c]! += values[i]! * step * (bare ? code[c]! : folds ? level : scale[c]! * level + zero[c]!);
        if (bare) stored[c]! += weights[members[i]!]! * (zero[c]! - scale[c]! * offset[c]!);
      });
    }
  }
  const restored = head.valuesRotate() ? hadamard64(stored) : stored;
  return raw.map((value, c) => f((value + restored[c]!) / sum));
}

describe('tolerances', () => {
  const schemes: [string, HeadScheme][] = [
    ['calibrated', calibrated('half')],
    ['innerq', INNERQ],
    ['rotated', ROTATED],
    ['hybrid per token', { ...INNERQ, value: { bits: 3, group: 'channels64', mode: 'hybrid' } }],
    ['asymmetric per token', { ...INNERQ, value: { bits: 4, group: 'channels32', mode: 'asymmetric' } }],
  ];
  test.each(schemes)(
    '%s: 16-bit integer arithmetic stays within the bound and near what is typical',
    (_, scheme) => {
      let [squares, expected, widest] = [0, 0, 0];
      for (let seed = 0; seed < 6; seed++) {
        const { head, random } = filled(scheme, 290, seed);
        const q = random.gaussians(scheme.headDim, seed % 2 ? 1 : 0.2);
        const run = attendHead(q, head, head.length - 1);
        const bound = attentionTolerance(q, head, run);
        imitation(q, head).forEach((value, c) => {
          const error = Math.abs(value - run.out[c]!);
          expect(error).toBeLessThanOrEqual(bound.out[c]!);
          squares += error ** 2;
          expected += bound.typical[c]! ** 2;
          widest = Math.max(widest, bound.out[c]! / Math.max(...run.out.map(Math.abs)));
        });
      }
      expect(squares).toBeLessThan(4 * expected + 1e-14);
      expect(widest).toBeLessThan(0.05); // a bound that forgives everything would prove nothing
    },
  );
});
