/** Everything a layer stores, native against reference, on every instruction set. */
import { type HeadScheme } from '../reference/cache';
import { PAGE_TOKENS } from '../reference/types';
import { hardTokens, hardValues } from './hard';
import { appendRagged, backendOf, createCache, expectedReadBack, isas } from './native';
import { readBackDifference, referenceHeads } from './native';
import { expectedPage, pageDifference } from './pages';
import { Random } from './random';
import { specName } from './specs';

/** Differences of all pages and windows after the same hard tokens; empty when everything is equal. */
export function storageDifferences(schemes: readonly HeadScheme[], tokens: number, seed = 1): string[] {
  const random = new Random(seed);
  const { headDim, sink } = schemes[0]!;
  const keys = schemes.map(() => hardTokens(random, tokens, headDim));
  const values = schemes.map(() => hardValues(random, tokens, headDim, sink));
  const heads = referenceHeads(schemes, keys, values);
  const reach = heads[0]!.tokens.filter(
    ({ key, value }) => key.kind !== 'window' || value.kind !== 'window',
  ).length;
  const expected = heads.map((head) => ({
    pages: Array.from({ length: Math.ceil(reach / PAGE_TOKENS) }, (_, page) => expectedPage(head, page)),
    readBack: expectedReadBack(head),
    name: `K ${specName(head.scheme.key)}, V ${specName(head.scheme.value)}`,
  }));

  return isas().flatMap((isa) => {
    using cache = createCache(backendOf(isa), { heads: [schemes] });
    const sequence = cache.sequence();
    appendRagged(sequence, 0, keys, values, new Random(seed));
    return expected.flatMap(({ pages, readBack, name }, h) => {
      const found = pages.map((page, i) => {
        const what = pageDifference(sequence.pageBytes(0, h, i), page);
        return what && `page ${i}: ${what}`;
      });
      found.push(readBackDifference(sequence.readBackSync(0, h), readBack, headDim));
      return found.flatMap((what) => (what === undefined ? [] : [`${isa}, ${name}, head ${h}: ${what}`]));
    });
  });
}
