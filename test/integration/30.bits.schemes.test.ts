/** The same bits for everything that schemes do to keys and values before rounding, and for every kind of input. */
import { type Sequence } from '../../lib';
import { type HeadScheme } from '../reference/cache';
import { toHalfBits } from '../reference/half';
import { appendRagged, backendOf, createCache, disposeBackends, expectedReadBack } from '../support/native';
import { interleave, readBackDifference, referenceHeads } from '../support/native';
import { expectedPage, pageDifference } from '../support/pages';
import { plantedTokens, Random } from '../support/random';
import { storageDifferences } from '../support/storage';
import { bitTreatments, innerq, rotatedHeads } from '../support/treatments';

afterAll(disposeBackends);

describe('every treatment', () => {
  const dims = (name: string) => [64, 80, ...(name.startsWith('calibrated 2/2') ? [96, 128, 256] : [])];
  const cases = bitTreatments.flatMap(({ name, heads }) =>
    dims(name).map((headDim) => ({ name, heads, headDim, tokens: headDim === 256 ? 60 : 160 })),
  );
  const rest = bitTreatments.map(({ name, heads }, i) => ({
    name,
    heads,
    headDim: [96, 128, 256][i % 3]!,
    tokens: 60,
  }));
  test.each([...cases, ...rest])('$name: $headDim channels, $tokens tokens', ({ heads, headDim, tokens }) => {
    expect(storageDifferences(heads(headDim), tokens, headDim)).toEqual([]);
  });

  test('no statistics, no quantisation: statTokens never reached', () => {
    const heads = rotatedHeads(4, 2)(64).map((head) => ({ ...head, statTokens: 100 }));
    expect(storageDifferences(heads, 99)).toEqual([]);
    expect(storageDifferences(heads, 100)).toEqual([]);
  });
});

/** The pages of one head, for comparison. */
function pagesOf(sequence: Sequence, heads: number) {
  return Array.from({ length: heads }, (_, head) => sequence.pageBytes(0, head, 0));
}

describe('the way tokens come in does not matter', () => {
  const schemes = innerq(
    { bits: 3, group: 'channels32', mode: 'hybrid' },
    { bits: 2, group: 'tokens32', mode: 'hybrid' },
  )(64);
  const random = new Random(4);
  const bfloat = (x: Float32Array) => Uint16Array.from(new Uint32Array(x.buffer), (bits) => bits >>> 16);
  // Eight significant bits: equal in float32, binary16 and bfloat16.
  const coarse = () =>
    plantedTokens(random, 150, 64).map(
      (row) => new Float32Array(Uint32Array.from(bfloat(row), (bits) => bits << 16).buffer),
    );
  const keys = schemes.map(coarse);
  const values = schemes.map(coarse);

  test('float32, binary16 and bfloat16, in one call or in many', () => {
    using cache = createCache(backendOf(), { heads: [schemes] });
    const [k, v] = [interleave(keys), interleave(values)];
    const sequences = Array.from({ length: 4 }, () => cache.sequence());
    sequences[0]!.appendSync(0, k, v);
    sequences[1]!.appendSync(0, Uint16Array.from(k, toHalfBits), Uint16Array.from(v, toHalfBits));
    sequences[2]!.appendSync(0, bfloat(k), bfloat(v), { dtype: 'bf16' });
    appendRagged(sequences[3]!, 0, keys, values, random, 3);
    const [first, ...others] = sequences.map((sequence) => pagesOf(sequence, 2));
    expect(first![0]!.keyZeros.length).toBeGreaterThan(0);
    for (const other of others) expect(other).toEqual(first);
  });

  test('memory that held other pages leaves no trace', () => {
    const scheme: HeadScheme = {
      headDim: 64,
      key: { bits: 4, group: 'channels64', mode: 'asymmetric' },
      value: { bits: 3, group: 'token', mode: 'asymmetric' },
      sink: 0,
      recent: 0,
    };
    using cache = createCache(backendOf(), { heads: [[scheme]], memory: 2 ** 16 });
    for (let round = 0; round < 3; round++) {
      using full = cache.sequence();
      appendRagged(full, 0, [plantedTokens(random, 128, 64)], [plantedTokens(random, 128, 64)], random);
    }
    const used = [plantedTokens(random, 3, 64)];
    using sequence = cache.sequence();
    appendRagged(sequence, 0, used, used, random);
    const [head] = referenceHeads([scheme], used, used);
    expect(pageDifference(sequence.pageBytes(0, 0, 0), expectedPage(head!, 0))).toBeUndefined();
    expect(readBackDifference(sequence.readBackSync(0, 0), expectedReadBack(head!), 64)).toBeUndefined();
  });

  test('truncated tokens leave no trace in what is written after them', () => {
    for (const heads of [schemes, rotatedHeads(3, 4)(64)]) {
      using cache = createCache(backendOf(), { heads: [heads] });
      using sequence = cache.sequence();
      appendRagged(sequence, 0, keys, values, random);
      const references = referenceHeads(heads, keys, values);
      const [newKeys, newValues] = [heads.map(coarse), heads.map(coarse)];
      sequence.truncateSync(83);
      appendRagged(sequence, 0, newKeys, newValues, random);
      references.forEach((head, h) => {
        head.truncate(83);
        newKeys[h]!.forEach((key, i) => head.append(key, newValues[h]![i]!));
        expect(pageDifference(sequence.pageBytes(0, h, 0), expectedPage(head, 0))).toBeUndefined();
        expect(readBackDifference(sequence.readBackSync(0, h), expectedReadBack(head), 64)).toBeUndefined();
      });
    }
  });
});
