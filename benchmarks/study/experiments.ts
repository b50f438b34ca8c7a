/**
 * The study behind docs/fidelity.md: each experiment is one `innerkv sweep`, its rows are names that the command line takes.
 * Windows of 2,048 tokens under P3 on SmolLM2-135M unless it says otherwise.
 */

export interface Experiment {
  readonly name: string;
  /** What it asks. */
  readonly question: string;
  /** In the folder of evaluation data. */
  readonly text: string;
  readonly protocol: 'P3' | 'P4';
  /** Tokens of a window; default: the protocol's. */
  readonly tokens?: number;
  readonly windows: number;
  /** Of `calibrationTexts`; the first serves schemes that name none. */
  readonly calibrations: readonly string[];
  readonly schemes: readonly string[];
  /** Mean KLDs of a float32 simulation of the same algorithms: fake-quantised cache, the same visibility. */
  readonly simulated?: Readonly<Record<string, number>>;
}

/** The first 2,048 tokens of each are observed. */
export const calibrationTexts: Readonly<Record<string, string>> = {
  wiki: 'texts/calibration/wiki.utf8',
  c4: 'texts/calibration/c4.utf8',
  technical: 'texts/calibration/technical.utf8',
};

const wikitext = 'texts/wikitext-2-raw/wikitext2-test-joined.txt';
const moby = 'texts/books/moby_dick.txt';
const peers = ['q4_0@0+0', 'innerq-base', 'innerq-hybrid-released'];
const calibrated = 'calibrated-{k4v4,k3v3,k3v2,k2v2,k2v1}';
/** Differences between schemes on the same positions show in short windows; levels do not compare with those of 2,048. */
const screening = {
  text: wikitext,
  protocol: 'P3',
  tokens: 1024,
  windows: 2,
  calibrations: ['wiki'],
} as const;

const withLayers = (layers: string, scheme: string): string =>
  `calibrated-k2v2[${layers
    .split(' ')
    .map((one) => `${one}=${scheme}`)
    .join()}]`;

export const experiments: readonly Experiment[] = [
  {
    name: 'wikitext',
    question: 'the text that papers report, calibrated on other articles of the same kind',
    text: wikitext,
    protocol: 'P3',
    windows: 4,
    calibrations: ['wiki'],
    schemes: [...peers, 'innerq-{small,hybrid}', 'rotated-{k4v4,k3v3,k2v2}', calibrated],
    simulated: {
      ...{ 'q4_0@0+0': 0.1232, 'innerq-base': 0.1248, 'innerq-hybrid-released': 0.1851 },
      ...{ 'calibrated-k4v4': 0.0012, 'calibrated-k3v3': 0.0052, 'calibrated-k3v2': 0.0112 },
      ...{ 'calibrated-k2v2': 0.0282, 'calibrated-k2v1': 0.0769 },
    },
  },
  {
    name: 'moby-dick',
    question:
      'another kind of text; calibration from its own kind, from the web, from technical prose, from the prompt',
    text: moby,
    protocol: 'P3',
    windows: 2,
    calibrations: ['wiki', 'c4', 'technical'],
    schemes: [
      ...[...peers, 'rotated-{k4v4,k3v3,k2v2}', calibrated],
      ...['calibrated-{k3v3,k2v2}:{c4,technical}', 'prompt-{k3v3,k2v2}'],
    ],
    simulated: {
      ...{ 'q4_0@0+0': 0.1463, 'innerq-base': 0.1028, 'innerq-hybrid-released': 0.1712 },
      ...{ 'calibrated-k4v4': 0.0009, 'calibrated-k3v3': 0.0043, 'calibrated-k3v2': 0.0095 },
      ...{ 'calibrated-k2v2': 0.0223, 'calibrated-k2v1': 0.0652 },
    },
  },
  {
    name: 'moby-dick-8k',
    question: 'length: the second half of 8,192 tokens',
    text: moby,
    protocol: 'P4',
    windows: 1,
    calibrations: ['c4'],
    schemes: ['q4_0@0+0', 'innerq-base', 'rotated-k3v3', calibrated],
    simulated: { 'innerq-base': 1.0309, 'calibrated-k3v3': 0.004, 'calibrated-k2v2': 0.0209 },
  },
  {
    name: 'tinyshakespeare',
    question: 'a third text, far from every calibration text',
    text: 'texts/tinyshakespeare/input.txt',
    protocol: 'P3',
    windows: 2,
    calibrations: ['c4', 'wiki'],
    schemes: ['q4_0@0+0', 'innerq-base', 'rotated-k3v3', calibrated, 'calibrated-k2v2:wiki', 'prompt-k2v2'],
  },
  {
    ...screening,
    name: 'parts',
    question: 'what each part of a scheme brings at equal bits',
    schemes: [
      'calibrated-k2v2',
      'calibrated-k2v2-no-{blocks,mean,lambda,rotation,feedback,clip,unbiased}',
      'calibrated-k3v3{,-no-lambda,-no-feedback}',
      'rotated-k3v3{,-no-mean,-no-rotation,-no-clip}',
      'innerq-{base,small,hybrid,hybrid-released,k3v3-symmetric-no-lambda,k3v2-asymmetric}',
    ],
  },
  {
    ...screening,
    name: 'windows',
    question: 'how many tokens to keep in 16 bits, and how many of them first ones',
    schemes: [
      'calibrated-k2v2@{0+0,4+0,4+28,0+128,4+124,16+112,32+96,64+64,128+0}',
      'rotated-k3v3@{4+28,4+124,32+96}',
    ],
  },
  {
    ...screening,
    name: 'split',
    question: 'bits of keys and of values at equal size',
    schemes: ['{calibrated,rotated}-{k4v3,k3v4,k4v2,k3v3,k2v4,k3v2,k2v3,k3v1,k2v2}'],
  },
  {
    name: 'confirm',
    question: 'what won the screening of splits and would change a default, in whole windows',
    text: wikitext,
    protocol: 'P3',
    windows: 4,
    calibrations: ['wiki'],
    schemes: ['rotated-{k4v2,k3v3,k3v1,k2v2}'],
  },
  {
    name: 'confirm-moby-dick',
    question: 'the same on another text',
    text: moby,
    protocol: 'P3',
    windows: 2,
    calibrations: ['wiki'],
    schemes: ['rotated-{k4v2,k3v3,k3v1,k2v2}'],
  },
  {
    ...screening,
    name: 'layers',
    question: 'how much each layer alone costs in 2 bits, the others in 16',
    tokens: 1024,
    schemes: [`fp16[{${Array.from({ length: 30 }, (_, layer) => layer).join()}}=calibrated-k2v2]`],
  },
  {
    name: 'edges',
    question:
      'a quarter bit more on average: the first and last layers in 4 bits, the layers that `layers` found dearest, half of all',
    text: moby,
    protocol: 'P3',
    windows: 2,
    calibrations: ['wiki'],
    schemes: [
      'calibrated-{k2v2,k3v2}',
      ...['0-1 28-29', '7 18 20 23'].map((four) => withLayers(four, 'calibrated-k4v4')),
      ...['0-14', '15-29', '2-3 5-10 14 17-18 20 23-24 28'].map((half) =>
        withLayers(half, 'calibrated-k3v2'),
      ),
    ],
  },
];
