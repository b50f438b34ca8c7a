/** Attention over every storage of keys and every storage of values, each in some head size, group and length. */
import { checkScheme } from '../support/attention-cases';
import { disposeBackends } from '../support/native';
import { specName, specPairs } from '../support/specs';
import { HEAD_DIMS } from '../reference/types';

afterAll(disposeBackends);

const PARTS = 5;

test.each(Array.from({ length: PARTS }, (_, part) => part))('specs, part %i of 5', (part) => {
  const wrong = specPairs().flatMap(({ key, value }, i) => {
    if (i % PARTS !== part) return [];
    const turn = Math.floor(i / PARTS);
    const { found } = checkScheme(
      (headDim) => [{ headDim, key, value, sink: 1, recent: 2 }],
      {
        headDim: HEAD_DIMS[(turn + part) % HEAD_DIMS.length]!,
        group: ([1, 3, 4, 7, 8] as const)[turn % 5]!,
        tokens: ([129, 97, 33, 257] as const)[turn % 4]!,
        queries: ([1, 2, 5] as const)[turn % 3]!,
        mask: {},
        removed: turn % 2 === 0,
        causal: turn % 3 > 0,
      },
      i,
    );
    return found.map((what) => `K ${specName(key)}, V ${specName(value)}: ${what}`);
  });
  expect(wrong).toEqual([]);
});
