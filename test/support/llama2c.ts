/** Writes a llama2.c checkpoint of zeros: hidden, intermediate, layers, query heads, KV heads, vocabulary, context. */
export type Llama2cHeader = readonly [number, number, number, number, number, number, number];

export function writeLlama2c(header: Llama2cHeader, extra = 0): Uint8Array {
  const [hidden, intermediate, layers, queryHeads, kvHeads, vocabulary, context] = header.map(Math.abs) as [
    ...Llama2cHeader,
  ];
  const headDim = hidden / queryHeads;
  const attention = 2 * hidden * hidden + 2 * hidden * kvHeads * headDim;
  const layer = 2 * hidden + attention + 3 * hidden * intermediate;
  const head = header[5] < 0 ? vocabulary * hidden : 0;
  const floats = vocabulary * hidden + layers * layer + hidden + context * headDim + head;
  const bytes = new Uint8Array(28 + 4 * floats + extra);
  const view = new DataView(bytes.buffer);
  header.forEach((value, i) => view.setInt32(4 * i, value, true));
  return bytes;
}
