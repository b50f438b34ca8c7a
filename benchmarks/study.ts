/**
 * `npm run study`: measures what docs/fidelity.md says. Every experiment is one `innerkv sweep`, printed before it runs; its
 * results lie in benchmarks/results/study and are gone on with when it is interrupted. Data: INNERKV_DATA.
 */
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { calibrate } from '../lib/cli/calibrate';
import {
  EXIT,
  UsageError,
  list,
  parseOptions,
  required,
  text,
  type Command,
  type Values,
} from '../lib/cli/command';
import { schemeNames } from '../lib/cli/contenders';
import { runProgram } from '../lib/cli/program';
import { writeWhole } from '../lib/cli/files';
import { renderSvg } from '../lib/cli/svg';
import { plotOf, ranked, sweep, type SweepReport } from '../lib/cli/sweep';
import { dataPath } from '../test/support/data';
import { calibrationTexts, experiments, type Experiment } from './study/experiments';
import { leads, type Lead } from './study/leads';
import { tableOf } from './study/report';

const root = join(__dirname, '..');
const model = dataPath('models', 'smollm2-135m', 'smollm2-135m-instruct.q4_1.gguf');
const work = join(root, 'build', 'study');
const results = join(root, 'benchmarks', 'results', 'study');

async function execute(command: Command, args: readonly string[]): Promise<void> {
  console.log(
    `\n$ innerkv ${command.name} ${args.map((one) => (/[{},[\]=@]/.test(one) ? `'${one}'` : one)).join(' ')}`,
  );
  const status = await command.run(parseOptions(command, args));
  if (status !== EXIT.ok) throw new Error(`innerkv ${command.name} ended with ${status}`);
}

async function momentsOf(name: string, threads: string): Promise<string> {
  const path = join(work, `${name}.calib.safetensors`);
  const source = dataPath(calibrationTexts[name]!);
  if (!existsSync(path))
    await execute(calibrate, ['--model', model, '--text', source, '--threads', threads, '-o', path]);
  return path;
}

async function run(experiment: Experiment, threads: string): Promise<void> {
  const { name, question, text: source, protocol, tokens, windows, calibrations, schemes } = experiment;
  console.log(`\n## ${name}: ${question}`);
  const files: string[] = [];
  for (const one of calibrations) files.push('--calibration', `${one}=${await momentsOf(one, threads)}`);
  await execute(sweep, [
    ...['--model', model, '--text', dataPath(source), '--protocol', protocol, '--chunks', String(windows)],
    ...(tokens === undefined ? [] : ['--tokens', String(tokens)]),
    ...files,
    ...schemes.flatMap((scheme) => ['--scheme', scheme]),
    ...['--threads', threads, '--out', join(results, `${name}.json`)],
  ]);
}

/** What was measured, by a sweep or, before there were sweeps, by perplexity. */
function reportOf(name: string): SweepReport | undefined {
  const paths = [join(results, `${name}.json`), join(results, '..', `2026-11-21-${name}.json`)];
  const path = paths.find((one) => existsSync(one));
  return path === undefined ? undefined : (JSON.parse(readFileSync(path, 'utf8')) as SweepReport);
}

function printTable(experiment: Experiment): void {
  const report = reportOf(experiment.name);
  if (!report) return;
  const { windows, tokensScored, protocol } = report;
  console.log(`\n## ${experiment.name}: ${experiment.question}\n`);
  console.log(`${windows} windows of ${protocol.window} tokens, ${tokensScored} scored\n`);
  console.log(tableOf(report, experiment, schemeNames(experiment.schemes)));
}

async function pursue({ name, question, run: start }: Lead, threads: string): Promise<void> {
  console.log(`\n## ${name}: ${question}`);
  await start({
    ...{ model, work, data: dataPath, out: join(results, `${name}.json`), threads: Number(threads) },
    moments: () => momentsOf('wiki', threads),
  });
}

const study: Command = {
  name: 'run',
  summary: 'the experiments of docs/fidelity.md',
  options: {
    only: { value: 'NAME,…', help: 'these experiments' },
    threads: { value: 'N', help: 'threads', default: '1' },
    plan: { help: 'only print what would be measured' },
    tables: { help: 'only print the tables of what was measured' },
    svg: { value: 'FILE', help: 'only draw the experiment wikitext' },
  },
  notes: `Experiments:\n${[...experiments, ...leads].map(({ name, question }) => `  ${name}: ${question}`).join('\n')}`,
  async run(values: Values) {
    const all = [...experiments, ...leads].map(({ name }) => name);
    const only = list(values, 'only') ?? all;
    const unknown = only.filter((name) => !all.includes(name));
    if (unknown.length > 0) throw new UsageError(`there is no experiment ${unknown.join(', ')}`);
    const chosen = experiments.filter(({ name }) => only.includes(name));
    if (values.plan === true) {
      for (const one of chosen) console.log(`${one.name}: ${one.windows} x ${one.schemes.join(' ')}`);
      return EXIT.ok;
    }
    const svg = text(values, 'svg');
    if (svg !== undefined) {
      const report = reportOf('wikitext');
      if (!report) throw new UsageError('wikitext was not measured yet');
      const title = `SmolLM2-135M, WikiText-2, ${report.windows} windows of 2,048 tokens decoded through the cache`;
      writeWhole(svg, renderSvg(plotOf(ranked(report).schemes, title)));
      return EXIT.ok;
    }
    if (values.tables === true) {
      for (const one of chosen) printTable(one);
      return EXIT.ok;
    }
    mkdirSync(work, { recursive: true });
    mkdirSync(results, { recursive: true });
    const threads = required(values, 'threads');
    for (const one of chosen) await run(one, threads);
    for (const one of leads.filter(({ name }) => only.includes(name))) await pursue(one, threads);
    return EXIT.ok;
  },
};

runProgram({ name: 'study', summary: 'what schemes cost a model, at length', commands: [study] });
