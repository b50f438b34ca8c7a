/**
 * Golden bytes of outlier rows (docs/format.md section 8): what the reference writes, for native code to write and
 * read alike. `npx ts-node test/golden/outliers.ts` writes test/golden/outliers.txt anew.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeOutliers, type Outlier } from '../reference/outliers';
import { PAGE_TOKENS } from '../reference/types';

export const OUTLIERS_FILE = join(__dirname, 'outliers.txt');

/** Small seeded integers (a linear congruence with the constants of Numerical Recipes). */
function integers(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

/** Zero of both signs, the ends of the subnormals and normals, one, and 65504: binary16 bits. */
const VALUES = [0x0000, 0x8000, 0x0001, 0x83ff, 0x0400, 0x3c00, 0xbc00, 0x7bff, 0xfbff];

/** Rows that fill `capacity` as far as `most` entries a row allow, ascending by channel. */
function rowsOf(capacity: number, headDim: number, most: number): Outlier[][] {
  const below = integers(capacity * 31 + headDim);
  let left = capacity;
  return Array.from({ length: PAGE_TOKENS }, (_, slot) => {
    const count = slot === PAGE_TOKENS - 1 ? Math.min(left, headDim) : Math.min(left, below(most + 1));
    left -= count;
    const channels = new Set<number>();
    while (channels.size < count)
      channels.add(channels.size === 0 && below(4) === 0 ? headDim - 1 : below(headDim));
    return [...channels]
      .sort((a, b) => a - b)
      .map((channel) => ({ channel, valueBits: below(2) ? VALUES[below(VALUES.length)]! : below(0x7c00) }));
  });
}

/** [capacity, headDim, most entries of a row]: 8- and 16-bit row starts, odd capacities, empty and full sections. */
const CASES = [
  [0, 64, 0],
  [1, 64, 1],
  [7, 96, 3],
  [128, 80, 2],
  [255, 128, 5],
  [256, 128, 5],
  [301, 256, 6],
  [1000, 256, 20],
] as const;

/** Per case: a line of numbers, one line per row that has entries ("slot channel:bits ..."), the section in hex. */
export function goldenOutliers(): string {
  const hex = (value: number, digits: number) => value.toString(16).padStart(digits, '0');
  return CASES.map(([capacity, headDim, most]) => {
    const rows = rowsOf(capacity, headDim, most);
    const bytes = encodeOutliers(rows, capacity);
    return [
      `section ${capacity} ${headDim} ${bytes.length}`,
      ...rows.flatMap((row, slot) =>
        row.length === 0
          ? []
          : [`row ${slot} ${row.map((o) => `${o.channel}:${hex(o.valueBits, 4)}`).join(' ')}`],
      ),
      `bytes ${[...bytes].map((byte) => hex(byte, 2)).join('')}`,
      '',
    ].join('\n');
  }).join('');
}

if (require.main === module) writeFileSync(OUTLIERS_FILE, goldenOutliers());
