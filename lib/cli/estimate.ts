/** `innerkv estimate`: what a cache would take, by part, before anything is allocated. */
import { KvCache } from '../cache';
import { builtinSchemes, schemeNamed, type DescribedScheme } from '../schemes';
import { EXIT, UsageError, count, list, type Command, type Values } from './command';
import { bytes, table } from './terminal';
import { versions } from './version';

interface Row {
  readonly scheme: string;
  /** Codes, scales, dense zero points and outliers per number, without windows. */
  readonly bitsPerValue: number;
  /** Everything per number. */
  readonly bitsPerValueInAll: number;
  readonly windowBytes: number;
  readonly codeBytes: number;
  readonly scaleBytes: number;
  readonly zeroBytes: number;
  readonly outlierBytes: number;
  readonly paddingBytes: number;
  /** Bases of calibrated schemes: once per cache, whatever the number of sequences. */
  readonly basisBytes: number;
  readonly totalBytes: number;
  /** fp16 bytes over total bytes. */
  readonly saving: number;
}

/**
 * A scheme that stores as `name` does. Calibrated pages are as large as rotated ones; a model's moments, which the
 * scheme itself needs, change no size.
 */
function storageOf(name: string): DescribedScheme {
  if (!name.startsWith('calibrated-')) return schemeNamed(name);
  const twin = schemeNamed(name.replace('calibrated-', 'rotated-').replace(/-no-.*$/, ''));
  return {
    name,
    key: twin.key,
    value: twin.value,
    describe: () => twin.describe(),
    bitsPerValue: (headDim) => twin.bitsPerValue(headDim),
    layer: (...args) => ({ ...twin.layer(...args), onlineMean: false, statTokens: 0 }),
  };
}

export const estimate: Command = {
  name: 'estimate',
  summary: 'bytes of a cache by part and scheme, compared with 16 bits',
  options: {
    layers: { value: 'N', help: 'layers of the model', default: '32' },
    'query-heads': { value: 'N', help: 'query heads', default: '32' },
    'kv-heads': { value: 'N', help: 'key-value heads', default: '8' },
    'head-dim': { value: 'N', help: 'channels of a head: 64, 80, 96, 128 or 256', default: '128' },
    tokens: { value: 'N', help: 'tokens per sequence; K, M as suffix', default: '32K' },
    sequences: { value: 'N', help: 'sequences', default: '1' },
    scheme: { value: 'NAME,…', help: 'schemes to compare (default: all that ship)' },
  },
  notes: `Schemes: ${builtinSchemes.map(({ name }) => name).join(', ')};\nalso any rotated-kXvY and calibrated-kXvY.`,
  run(values: Values) {
    const shape = {
      layers: count(values, 'layers'),
      queryHeads: count(values, 'query-heads'),
      kvHeads: count(values, 'kv-heads'),
      headDim: count(values, 'head-dim'),
    };
    const load = { tokens: count(values, 'tokens'), sequences: count(values, 'sequences') };
    const names = list(values, 'scheme') ?? builtinSchemes.map(({ name }) => name);
    const numbers = 2 * shape.layers * shape.kvHeads * shape.headDim * load.tokens * load.sequences;
    if (!Number.isSafeInteger(32 * numbers)) throw new UsageError('this cache is larger than any machine');
    let fp16Bytes = 0;
    const rows = names.map((name): Row => {
      const scheme = storageOf(name);
      const parts = KvCache.estimate({ ...shape, ...load, scheme });
      fp16Bytes = parts.fp16Bytes;
      const { headDim } = shape;
      const based = name.startsWith('calibrated-') && scheme.key.bits !== 16;
      const basisBytes = based ? 4 * shape.layers * shape.kvHeads * (2 * headDim ** 2 + 4 * headDim) : 0;
      const { windowBytes, codeBytes, scaleBytes, zeroBytes, outlierBytes, paddingBytes } = parts;
      const totalBytes = parts.totalBytes + basisBytes;
      return {
        scheme: name,
        bitsPerValue: scheme.bitsPerValue(headDim),
        bitsPerValueInAll: (8 * totalBytes) / numbers,
        ...{
          windowBytes,
          codeBytes,
          scaleBytes,
          zeroBytes,
          outlierBytes,
          paddingBytes,
          basisBytes,
          totalBytes,
        },
        saving: fp16Bytes / totalBytes,
      };
    });
    if (values.json)
      console.log(
        JSON.stringify({ versions: versions(), ...shape, ...load, fp16Bytes, schemes: rows }, null, 2),
      );
    else print(rows, fp16Bytes);
    return EXIT.ok;
  },
};

function print(rows: readonly Row[], fp16Bytes: number): void {
  const titles = [
    'scheme',
    'bits',
    'in all',
    'codes',
    'scales',
    'zeros',
    'outliers',
    'windows',
    'bases',
    'padding',
    'total',
    'saving',
  ];
  const columns = titles.map((title) => ({ title, text: title === 'scheme' }));
  const cells = rows.map((row) => [
    row.scheme,
    row.bitsPerValue.toFixed(3),
    row.bitsPerValueInAll.toFixed(3),
    ...[row.codeBytes, row.scaleBytes, row.zeroBytes, row.outlierBytes].map(bytes),
    ...[row.windowBytes, row.basisBytes, row.paddingBytes].map(bytes),
    bytes(row.totalBytes),
    `${row.saving.toFixed(2)} x`,
  ]);
  console.log(table(columns, cells));
  console.log(
    `\n16-bit cache: ${bytes(fp16Bytes)}. Zero points of hybrid schemes depend on the data and are not counted.`,
  );
}
