/**
 * Byte-pair merging by scores, as SentencePiece defines it (Kudo and Richardson 2018; BPE model): begin with single
 * characters, and while any two neighbours joined are a piece, join those whose piece has the highest score, the
 * leftmost of equals. Characters that are no piece become the pieces of their UTF-8 bytes. Quadratic, for short texts.
 */

export interface Pieces {
  /** Id of each piece that merging may give. */
  readonly ids: ReadonlyMap<string, number>;
  readonly scores: ArrayLike<number>;
  /** Ids of the 256 bytes. */
  readonly bytes: readonly number[];
}

/** Ids of a text that already has its spaces written as U+2581. */
export function mergeByScore(text: string, { ids, scores, bytes }: Pieces): number[] {
  const symbols = Array.from(text);
  for (;;) {
    let best = -1;
    let highest = -Infinity;
    for (let i = 0; i + 1 < symbols.length; i++) {
      const id = ids.get(symbols[i]! + symbols[i + 1]!);
      if (id === undefined || (best >= 0 && scores[id]! <= highest)) continue;
      best = i;
      highest = scores[id]!;
    }
    if (best < 0) break;
    symbols.splice(best, 2, symbols[best]! + symbols[best + 1]!);
  }
  return symbols.flatMap((symbol) => {
    const id = ids.get(symbol);
    return id === undefined ? [...new TextEncoder().encode(symbol)].map((byte) => bytes[byte]!) : [id];
  });
}
