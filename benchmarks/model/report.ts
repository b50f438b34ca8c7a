/** The report as markdown. */
import { type Activations } from '../../lib/model';
import { type Machine } from '../cpu/machine';
import { type Cell, type Row, type Spread } from './measure';
import { type PeerFacts } from './peer';

export interface Report {
  readonly benchmark: 'model';
  readonly command: string;
  readonly machine: Machine;
  readonly isa: string;
  readonly model: string;
  /** Weights that one decoded token reads. */
  readonly bytesPerToken: number;
  readonly threads: number;
  readonly activations: Activations;
  readonly chunk: number;
  readonly rounds: number;
  readonly tokens: number;
  readonly peer: PeerFacts | undefined;
  readonly contexts: readonly Cell[];
}

const between = ({ low, high }: Spread, digits: number) => `${low.toFixed(digits)}–${high.toFixed(digits)}`;

function renderRow(row: Row): string {
  const { decodeMilliseconds: decode, overBaseline: ratio, parts } = row;
  const share = (part: number) => part.toFixed(1);
  const cells = [
    row.peer ? row.contender : `\`${row.contender}\``,
    row.bitsPerValue.toFixed(2),
    row.cacheBytes === undefined ? '' : (row.cacheBytes / 2 ** 20).toFixed(1),
    row.prefillTokensPerSecond.toFixed(0),
    `${row.prefillOverBaseline.toFixed(2)} x`,
    row.prefillProcessorMilliseconds.toFixed(1),
    decode.median.toFixed(1),
    between(decode, 1),
    row.decodeTokensPerSecond.toFixed(1),
    `${ratio.median.toFixed(2)} x`,
    between(ratio, 2),
    row.processorMilliseconds.median.toFixed(1),
    ...(parts ? [share(parts.products), share(parts.append), share(parts.attend)] : ['', '', '']),
  ];
  return `| ${cells.join(' | ')} |`;
}

function renderCell({ tokens, baseline, rows }: Cell): string {
  const titles = [
    ...[
      '',
      'bits',
      'cache MiB',
      'prefill tokens/s',
      'ratio',
      'processor ms',
      'decode ms',
      '10–90 %',
      'tokens/s',
      'ratio',
    ],
    ...['10–90 %', 'processor ms', 'products', 'append', 'attend'],
  ];
  const rule = titles.map((_, i) => (i === 0 ? '---' : '---:'));
  const lines = [titles, rule].map((line) => `| ${line.join(' | ')} |`);
  return `### ${tokens} tokens\n\n${[...lines, ...rows.map(renderRow)].join('\n')}\n\nRatios: ${baseline} takes so many times as long.\n`;
}

export function renderReport(report: Report): string {
  const { machine, peer } = report;
  const other = peer
    ? `; ${peer.name} ${peer.version}, flash attention ${peer.flashAttention ? 'on' : 'off'}`
    : '';
  return [
    '# A model through the cache',
    '',
    `\`${report.command}\`, ${machine.date}, commit ${machine.commit}`,
    '',
    `${report.model}, ${(report.bytesPerToken / 1e6).toFixed(1)} MB of weights per token; ${machine.processor}, ${report.isa}, ${report.threads} threads, ` +
      `Node ${machine.versions.node ?? ''}, load ${machine.load.toFixed(1)}; ${report.activations} activations${other}`,
    '',
    `Prefill in chunks of ${report.chunk} tokens, all contenders in turn; the rate is that of the whole prompt. Decoding: ${report.rounds} rounds in turn of ` +
      `${report.tokens} tokens each, batch 1. Medians over tokens, ratios over rounds. Processor ms is per token and counts all threads: the figure to trust on a busy machine. The last columns are ` +
      'milliseconds of the median token in products with weights, in appending to the cache, in attention.',
    '',
    ...report.contexts.map(renderCell),
  ].join('\n');
}
