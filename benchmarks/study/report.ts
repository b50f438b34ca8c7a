/** Tables of docs/fidelity.md from the stored results. */
import { type SweepReport, type SweepRow } from '../../lib/cli/sweep';
import { type Experiment } from './experiments';

const percent = (share: number) => `${(100 * share).toFixed(1)} %`;
const signed = (value: number) => `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(2)}`;

function markdown(titles: readonly string[], rows: readonly (readonly string[])[]): string {
  return [titles, titles.map(() => '---'), ...rows].map((row) => `| ${row.join(' | ')} |`).join('\n');
}

/** One experiment: rows in the order in which its schemes are given. */
export function tableOf(
  { schemes }: SweepReport,
  { simulated = {} }: Experiment,
  names: readonly string[],
): string {
  const compared = Object.keys(simulated).length > 0;
  const cells = (row: SweepRow) => [
    `\`${row.scheme}\``,
    row.bitsPerValue.toFixed(2),
    row.bitsPerValueInAll.toFixed(2),
    row.perplexity.toFixed(3),
    row.scheme === 'fp16' ? '' : signed(row.perplexityChange),
    row.bitsPerByte?.toFixed(4) ?? '',
    row.meanKld.toFixed(4),
    row.kld99.toFixed(3),
    percent(row.topAgreement),
    percent(row.rmsShift),
    ...(compared ? [simulated[row.scheme]?.toFixed(4) ?? ''] : []),
  ];
  const titles = [
    'scheme',
    'bits',
    'in all',
    'ppl',
    'change',
    'bits/byte',
    'KLD',
    '99 % KLD',
    'top-1',
    'rms Δp',
  ];
  const ordered = ['fp16', ...names].flatMap((name) => schemes.filter(({ scheme }) => scheme === name));
  return markdown([...titles, ...(compared ? ['simulated KLD'] : [])], ordered.map(cells));
}
