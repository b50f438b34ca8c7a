/** What innerkv_cuda_bench measures, as JSON and as markdown. */
import { type Machine } from '../cpu/machine';

interface CudaCell {
  readonly scheme: string;
  readonly batch?: number;
  readonly context?: number;
  /** Median of the kernels' time, with its quartiles. */
  readonly microseconds?: number;
  readonly low?: number;
  readonly high?: number;
  /** Codes, scales, zero points and windows that the step reads. */
  readonly bytes?: number;
  readonly gigabytesPerSecond?: number;
  /** Share of the copy bandwidth. */
  readonly ofCopy?: number;
  /** How many times faster than our own attention over 16-bit pages. */
  readonly overFp16?: number | null;
  /** Why there are no times. */
  readonly skipped?: string;
}

interface CudaAppend {
  readonly scheme: string;
  readonly tokenKernelMicroseconds?: number;
  readonly tokenWallMicroseconds?: number;
  readonly bulkTokensPerSecond?: number;
  readonly bulkInputGigabytesPerSecond?: number;
  readonly skipped?: string;
}

interface CudaPrefill {
  readonly scheme: string;
  readonly queries?: number;
  readonly context?: number;
  readonly microseconds?: number;
  readonly low?: number;
  readonly high?: number;
  /** 4 operations per channel of a query head and visible token. */
  readonly teraflops?: number;
  /** Time in units of the time over 16-bit pages. */
  readonly ofFp16Time?: number | null;
  readonly skipped?: string;
}

export interface CudaReport {
  readonly benchmark: 'cuda';
  readonly machine?: Machine;
  readonly device: {
    readonly name: string;
    readonly capability: string;
    readonly multiprocessors: number;
    readonly memoryBytes: number;
    readonly l2Bytes: number;
    readonly driver: number;
    readonly runtime: number;
  };
  readonly shape: { readonly queryHeads: number; readonly kvHeads: number; readonly headDim: number };
  readonly windows: { readonly sink: number; readonly recent: number };
  readonly repeats: number;
  readonly flushBytes: number;
  readonly copyGigabytesPerSecond: number;
  readonly seconds: number;
  readonly filling: string;
  readonly cells: readonly CudaCell[];
  readonly append: readonly CudaAppend[];
  /** Absent in reports of older versions. */
  readonly prefill?: readonly CudaPrefill[];
}

function table(titles: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const rule = titles.map((_, i) => (i === 0 ? '---' : '---:'));
  return [titles, rule, ...rows].map(line).join('\n');
}

function tokens(context: number): string {
  return context % 1024 === 0 ? `${context / 1024}K` : String(context);
}

function attention(cells: readonly CudaCell[]): string[][] {
  return cells.map((cell) => {
    const first = [`\`${cell.scheme}\``, String(cell.batch ?? ''), cell.context ? tokens(cell.context) : ''];
    const { microseconds: time, gigabytesPerSecond, ofCopy, overFp16, low, high } = cell;
    if (time === undefined) return [...first, cell.skipped ?? '', '', '', '', ''];
    return [
      ...first,
      time.toFixed(1),
      `${low!.toFixed(1)}–${high!.toFixed(1)}`,
      gigabytesPerSecond!.toFixed(0),
      `${(100 * ofCopy!).toFixed(1)} %`,
      overFp16 === undefined || overFp16 === null ? '' : `${overFp16.toFixed(2)} x`,
    ];
  });
}

function appends(rows: readonly CudaAppend[]): string[][] {
  return rows.map((row) =>
    row.tokenKernelMicroseconds === undefined
      ? [`\`${row.scheme}\``, row.skipped ?? '', '', '', '']
      : [
          `\`${row.scheme}\``,
          row.tokenKernelMicroseconds.toFixed(1),
          row.tokenWallMicroseconds!.toFixed(0),
          `${(row.bulkTokensPerSecond! / 1000).toFixed(0)} K`,
          row.bulkInputGigabytesPerSecond!.toFixed(1),
        ],
  );
}

function prefills(rows: readonly CudaPrefill[]): string[][] {
  return rows.map((row) => {
    const first = [`\`${row.scheme}\``, String(row.queries ?? ''), row.context ? tokens(row.context) : ''];
    if (row.microseconds === undefined) return [...first, row.skipped ?? '', '', '', ''];
    return [
      ...first,
      row.microseconds.toFixed(1),
      `${row.low!.toFixed(1)}–${row.high!.toFixed(1)}`,
      row.teraflops!.toFixed(0),
      row.ofFp16Time === undefined || row.ofFp16Time === null ? '' : row.ofFp16Time.toFixed(2),
    ];
  });
}

export function renderCudaReport(report: CudaReport): string {
  const { device, shape, windows, machine } = report;
  const version = (number: number) => `${Math.floor(number / 1000)}.${Math.floor((number % 1000) / 10)}`;
  return [
    '# Attention and append on a GPU',
    '',
    `${device.name} (compute capability ${device.capability}, ${device.multiprocessors} multiprocessors, ` +
      `${(device.l2Bytes / 2 ** 20).toFixed(0)} MiB of L2), driver for CUDA ${version(device.driver)}, runtime ` +
      version(device.runtime) +
      (machine ? `, ${machine.date}, commit ${machine.commit}` : ''),
    '',
    `A device-to-device copy moved ${report.copyGigabytesPerSecond.toFixed(0)} GB/s, bytes read plus bytes written.`,
    '',
    `One layer, one query token per sequence: ${shape.queryHeads} query heads over ${shape.kvHeads} KV heads of ` +
      `${shape.headDim} channels, windows of ${windows.sink} + ${windows.recent} tokens in 16 bits. Times are of the ` +
      `kernels alone, medians of ${report.repeats} with their quartiles, after ${(report.flushBytes / 2 ** 20).toFixed(0)} MiB ` +
      'were written over the L2 cache. GB/s counts what the sequences hold (codes, scales, zero points, windows). Filled ' +
      `for speed: ${report.filling}. "o1" in a name: the largest number of each key and value is kept apart, ` +
      `1 of ${shape.headDim} or ${(100 / shape.headDim).toFixed(2)} %.`,
    '',
    table(
      ['scheme', 'batch', 'context', 'µs', 'quartiles', 'GB/s', 'of copy', 'over fp16'],
      attention(report.cells),
    ),
    '',
    'One token to 32 layers (kernels in all, then the time of the calls), and 4,096 tokens at once to one layer:',
    '',
    table(['scheme', 'kernels µs', 'calls µs', 'bulk tokens/s', 'bulk input GB/s'], appends(report.append)),
    '',
    ...(report.prefill
      ? [
          'The last tokens of one sequence attend causally to all of it (TFLOP/s: 4 operations per channel, query head ' +
            'and visible token):',
          '',
          table(
            ['scheme', 'queries', 'context', 'µs', 'quartiles', 'TFLOP/s', 'time of fp16'],
            prefills(report.prefill),
          ),
          '',
        ]
      : []),
  ].join('\n');
}
