/** Words shared by the reference programs. Source: docs/format.md, sections 1 and 3. */

/** Bits of one code; 16 means binary16 values without codes and scales. */
export type Bits = 1 | 2 | 3 | 4 | 8 | 16;

/** Which elements share a scale: runs of 32 or 64 channels, a whole token, or 32 tokens of one channel. */
export type Group = 'channels32' | 'channels64' | 'token' | 'tokens32';

/** How codes become values; docs/format.md section 3. */
export type Mode = 'midRise' | 'zeroLevel' | 'signedMax' | 'asymmetric' | 'hybrid' | 'hybridReleased';

/** How one tensor (K or V) of a page is stored. */
export interface TensorSpec {
  readonly bits: Bits;
  readonly group: Group;
  readonly mode: Mode;
  /** Numbers of each token that are kept apart, 0 to 8; docs/format.md section 8. */
  readonly outliers?: number;
}

/** Tokens of a page and of a V sub-block (`tokens32`). */
export const PAGE_TOKENS = 128;
export const SUB_BLOCK_TOKENS = 32;

/** All widths that have codes. */
export const CODE_BITS = [1, 2, 3, 4, 8] as const;

/** All shipped head sizes. */
export const HEAD_DIMS = [64, 80, 96, 128, 256] as const;

/** Half-open channel ranges [start, end) of the groups of one token; the last may be short. */
export function channelGroups(headDim: number, group: Group): { start: number; end: number }[] {
  if (group === 'tokens32') throw new Error('tokens32 has no groups inside a token');
  const size = group === 'token' ? headDim : group === 'channels32' ? 32 : 64;
  const groups: { start: number; end: number }[] = [];
  for (let start = 0; start < headDim; start += size)
    groups.push({ start, end: Math.min(start + size, headDim) });
  return groups;
}

/** True if a zero point may exist for groups of this mode (dense or compact). */
export function hasZeroPoints(mode: Mode): boolean {
  return mode === 'asymmetric' || isHybrid(mode);
}

/** True if the sign bit of a scale chooses between two modes. */
export function isHybrid(mode: Mode): boolean {
  return mode === 'hybrid' || mode === 'hybridReleased';
}
