/** Which of several trades of one cost against another nobody else beats. */

/** `costs`: smaller is better. True where no other item is at least as good in all costs and better in one. */
export function paretoFront<T>(items: readonly T[], costs: (item: T) => readonly number[]): boolean[] {
  const all = items.map(costs);
  const beats = (a: readonly number[], b: readonly number[]) =>
    a.every((cost, i) => cost <= b[i]!) && a.some((cost, i) => cost < b[i]!);
  return all.map((own) => !all.some((other) => beats(other, own)));
}
