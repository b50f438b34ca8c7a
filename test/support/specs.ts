/** Case tables: which tensor specs there are, and few cases that still meet every pair of values. */
import { supportedSpecs } from '../../lib/binding';
import { type TensorSpec } from '../reference/types';

const plain = ({ bits, group, mode }: TensorSpec): TensorSpec => ({ bits, group, mode });

export function keySpecs(): TensorSpec[] {
  return supportedSpecs()
    .filter((spec) => spec.key)
    .map(plain);
}

export function valueSpecs(): TensorSpec[] {
  return supportedSpecs()
    .filter((spec) => spec.value)
    .map(plain);
}

/** Every key spec and every value spec at least once; neighbours in one table never meet neighbours in the other. */
export function specPairs(): { key: TensorSpec; value: TensorSpec }[] {
  const [keys, values] = [keySpecs(), valueSpecs()];
  return values.map((value, i) => ({ key: keys[(7 * i + 3) % keys.length]!, value }));
}

export function specName({ bits, group, mode, outliers = 0 }: TensorSpec): string {
  return bits === 16 ? '16' : `${bits}/${group}/${mode}${outliers > 0 ? ` + ${outliers}` : ''}`;
}

/** Lists of values, one list per dimension. */
type Choices = Readonly<Record<string, readonly unknown[]>>;

/** One value of each dimension. */
export type Chosen<T extends Choices> = { -readonly [name in keyof T]: T[name][number] };

/**
 * Cases in which every value of a dimension meets every value of every other one (pairwise covering), greedily and
 * without chance: each case starts from the first pair still missing and takes what covers most.
 */
export function pairwise<T extends Choices>(choices: T): Chosen<T>[] {
  const names = Object.keys(choices);
  const sizes = names.map((name) => choices[name]!.length);
  const missing = new Set<string>();
  const pair = (a: number, i: number, b: number, j: number) =>
    a < b ? `${a},${i},${b},${j}` : `${b},${j},${a},${i}`;
  for (let a = 0; a < names.length; a++)
    for (let b = a + 1; b < names.length; b++)
      for (let i = 0; i < sizes[a]!; i++) for (let j = 0; j < sizes[b]!; j++) missing.add(pair(a, i, b, j));

  const cases: Chosen<T>[] = [];
  while (missing.size > 0) {
    const [first] = missing;
    const [a, i, b, j] = first!.split(',').map(Number) as [number, number, number, number];
    const taken = new Map([
      [a, i],
      [b, j],
    ]);
    for (let d = 0; d < names.length; d++) {
      if (taken.has(d)) continue;
      let best = 0;
      let most = -1;
      for (let step = 0; step < sizes[d]!; step++) {
        const value = (step + cases.length) % sizes[d]!;
        const gain = [...taken].filter(([e, k]) => missing.has(pair(d, value, e, k))).length;
        if (gain > most) [best, most] = [value, gain];
      }
      taken.set(d, best);
    }
    for (const [d, k] of taken) for (const [e, l] of taken) if (d < e) missing.delete(pair(d, k, e, l));
    cases.push(
      Object.fromEntries(names.map((name, d) => [name, choices[name]![taken.get(d)!]])) as Chosen<T>,
    );
  }
  return cases;
}
