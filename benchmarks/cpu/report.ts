/** The report as markdown. */
import { type Machine } from './machine';
import { type Cell, type Clock, type Overhead } from './measure';
import { type Shape } from './workload';

export interface Report {
  readonly benchmark: 'cpu';
  readonly clock: Clock;
  readonly command: string;
  readonly machine: Machine;
  readonly shape: Shape;
  readonly windows: { readonly sink: number; readonly recent: number };
  /** GB/s copied by so many threads at once; reading and writing make twice that traffic. */
  readonly copy: readonly { readonly threads: number; readonly gigabytesPerSecond: number }[];
  readonly overhead: readonly Overhead[];
  readonly cells: readonly Cell[];
}

function table(titles: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const rule = titles.map((_, i) => (i === 0 ? '---' : '---:'));
  return [titles, rule, ...rows].map(line).join('\n');
}

function rate(tokensPerSecond: number): string {
  return tokensPerSecond >= 9950
    ? `${(tokensPerSecond / 1000).toFixed(0)} K`
    : `${(tokensPerSecond / 1000).toFixed(1)} K`;
}

function renderCell(cell: Cell): string {
  const { isa, threads, tokens, batch, rounds, fp32, fp16, schemes } = cell;
  const times = (ratio: number) => `${ratio.toFixed(2)} x`;
  const us = (time: number) => time.toFixed(time < 100 ? 1 : 0);
  const dense = (name: string, bits: number, time: Cell['fp32']) => [
    name,
    bits.toFixed(2),
    us(time.attendMicroseconds),
    time.gigabytesPerSecond.toFixed(1),
    times(fp32.attendMicroseconds / time.attendMicroseconds),
    times(fp16.attendMicroseconds / time.attendMicroseconds),
    '',
    '',
  ];
  const rows = [
    dense('dense float32', 32, fp32),
    dense('dense binary16', 16, fp16),
    ...schemes.map((row) => [
      `\`${row.scheme}\``,
      row.bitsPerValue.toFixed(2),
      us(row.attendMicroseconds),
      row.gigabytesPerSecond.toFixed(1),
      times(row.overFp32),
      times(row.overFp16),
      rate(row.appendTokensPerSecond),
      rate(row.bulkTokensPerSecond),
    ]),
  ];
  const titles = ['', 'bits', 'attend µs', 'GB/s', 'over float32', 'over binary16', 'append/s', 'bulk/s'];
  const title = `### ${isa}, ${threads} thread${threads > 1 ? 's' : ''}, ${tokens} tokens, batch ${batch}`;
  return `${title}\n\n${table(titles, rows)}\n\nMedians of ${rounds} rounds.\n`;
}

export function renderReport({
  clock,
  command,
  machine,
  shape,
  windows,
  copy,
  overhead,
  cells,
}: Report): string {
  const { queryHeads, kvHeads, headDim } = shape;
  const first = [
    '# Decode attention and append on a processor',
    '',
    `\`${command}\`, ${machine.date}, commit ${machine.commit}`,
    '',
    `${machine.processor}, ${machine.processors} processors, Node ${machine.versions.node ?? ''}, ${machine.versions.platform ?? ''}, load ${machine.load.toFixed(1)}; times by the ${clock} clock`,
    '',
    `One layer, one query token per sequence: ${queryHeads} query heads over ${kvHeads} KV heads of ${headDim} channels; windows of ` +
      `${windows.sink} + ${windows.recent} tokens in 16 bits. GB/s counts what the sequences hold (codes, scales, zero points, windows). ` +
      'Ratios are medians over rounds of times measured in the same round. append/s: tokens per second of one layer, one ' +
      'token a call; bulk/s: 1,024 tokens a call; both with everything rounding needs.',
    '',
    table(
      ['threads', 'memory copied, GB/s', 'attendSync µs', 'await attend µs', 'appendSync µs'],
      copy.map(({ threads, gigabytesPerSecond }, i) => [
        String(threads),
        gigabytesPerSecond.toFixed(1),
        overhead[i]!.attendSyncMicroseconds.toFixed(1),
        overhead[i]!.attendAsyncMicroseconds.toFixed(1),
        overhead[i]!.appendSyncMicroseconds.toFixed(1),
      ]),
    ),
    '',
    'The three times are of a sequence of one token: what a call costs before it has work. A copy reads and writes, so ' +
      'its traffic is twice the figure.',
    '',
  ];
  return [...first, ...cells.map(renderCell)].join('\n');
}
