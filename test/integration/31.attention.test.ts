/** Attention from the packed bits stays within the bounds that follow from its arithmetic: first half of the families. */
import { attentionCases, checkFamily } from '../support/attention-cases';
import { disposeBackends } from '../support/native';
import { attentionFamilies } from '../support/treatments';

afterAll(disposeBackends);

test('the cases meet every head size, group, length and mask with every family', () => {
  for (const { name } of attentionFamilies) {
    const mine = attentionCases.filter(({ family }) => family === name);
    const values = (pick: (one: (typeof mine)[number]) => unknown) => new Set(mine.map(pick)).size;
    expect([values((c) => c.headDim), values((c) => c.group), values((c) => c.tokens)]).toEqual([5, 5, 14]);
    expect([values((c) => c.queries), values((c) => c.mask), values((c) => c.causal)]).toEqual([3, 4, 2]);
  }
  const bits = (tensor: 'key' | 'value') =>
    new Set(attentionFamilies.map(({ heads }) => heads(64)[0]![tensor].bits)).size;
  expect([bits('key'), bits('value')]).toEqual([5, 6]);
});

test.each(attentionFamilies.slice(0, 8))('$name', ({ name }) => {
  const { wrong, widest } = checkFamily(name);
  expect(wrong).toEqual([]);
  expect(widest).toBeGreaterThan(1e-4); // bounds that nothing comes near would be of no use
});
