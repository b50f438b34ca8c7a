/** Attention from the packed bits stays within the bounds that follow from its arithmetic: second half of the families. */
import { checkFamily } from '../support/attention-cases';
import { disposeBackends } from '../support/native';
import { attentionFamilies } from '../support/treatments';

afterAll(disposeBackends);

test.each(attentionFamilies.slice(8))('$name', ({ name }) => {
  const { wrong, widest } = checkFamily(name);
  expect(wrong).toEqual([]);
  expect(widest).toBeGreaterThan(1e-4); // bounds that nothing comes near would be of no use
});
