/** Tokens on which quantisers go wrong, along both directions in which scales are shared. All values are binary16 numbers. */
import { SUB_BLOCK_TOKENS } from '../reference/types';
import { adversarialGroups, plantedTokens, type Random } from './random';

/** Tokens [tokens][headDim] of one head: planted gaussians, every fifth replaced by a hard group or by runs of hard groups. */
export function hardTokens(random: Random, tokens: number, headDim: number): Float32Array[] {
  const rows = plantedTokens(random, tokens, headDim);
  const whole = adversarialGroups(headDim, 3);
  const runs = adversarialGroups(32, 5);
  rows.forEach((row, t) => {
    if (t % 5 === 2) row.set(whole[((t - 2) / 5) % whole.length]!.values);
    if (t % 5 === 4)
      for (let start = 0; start < headDim; start += 32)
        row.set(random.pick(runs).values.subarray(0, headDim - start), start);
  });
  return rows;
}

/** The same for scales that 32 tokens of one channel share: sub-blocks begin behind the sink. */
export function hardValues(random: Random, tokens: number, headDim: number, sink: number): Float32Array[] {
  const rows = hardTokens(random, tokens, headDim);
  const columns = adversarialGroups(SUB_BLOCK_TOKENS, 7);
  for (let first = sink, block = 0; first + SUB_BLOCK_TOKENS <= tokens; first += SUB_BLOCK_TOKENS, block++)
    for (let channel = block % 2; channel < headDim; channel += 2) {
      const { values } = columns[((channel / 2 + block) % columns.length) | 0]!;
      for (let slot = 0; slot < SUB_BLOCK_TOKENS; slot++) rows[first + slot]![channel] = values[slot]!;
    }
  return rows;
}
