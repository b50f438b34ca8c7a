/** A small scatter plot with lines and labels as an SVG file, logarithmic on both axes. */

export interface Point {
  readonly x: number;
  readonly y: number;
  /** Beside the point; may be empty. */
  readonly label: string;
  /** Shown when a reader points at it. */
  readonly title?: string;
}

export interface Series {
  readonly name: string;
  readonly points: readonly Point[];
  /** Default: points joined by a line. */
  readonly style?: 'points' | 'line';
}

export interface Plot {
  readonly title: string;
  readonly xLabel: string;
  readonly yLabel: string;
  readonly series: readonly Series[];
}

const [WIDTH, HEIGHT] = [880, 560];
const AREA = { left: 84, right: 24, top: 56, bottom: 64 };
/** Colours that stay apart for most kinds of colour vision (Okabe and Ito). */
const COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000'];

function escape(text: string): string {
  const entities: Record<string, string> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' };
  return text.replace(/[&<>"]/g, (character) => entities[character]!);
}

const round = (value: number) => value.toFixed(1);

/** 1, 2 and 5 times powers of ten that lie inside [low, high], or all digits times them where those are fewer than three. */
function ticks(low: number, high: number): number[] {
  const first = Math.floor(Math.log10(low));
  const decades = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, i) => first + i);
  const of = (mantissas: readonly number[]) =>
    decades
      .flatMap((decade) => mantissas.map((mantissa) => Number(`${mantissa}e${decade}`)))
      .filter((tick) => tick >= low && tick <= high);
  const coarse = of([1, 2, 5]);
  return coarse.length < 3 ? of([1, 2, 3, 4, 5, 6, 7, 8, 9]) : coarse;
}

/** Places labels beside points, each in the first of four places where it covers no earlier one. */
class Labels {
  private readonly taken: { left: number; right: number; y: number }[] = [];

  place(x: number, y: number, content: string): { x: number; y: number; anchor: 'start' | 'end' } {
    const width = 6.2 * content.length;
    const choices = [
      { x: x + 7, y: y - 6, anchor: 'start' },
      { x: x + 7, y: y + 15, anchor: 'start' },
      { x: x - 7, y: y - 6, anchor: 'end' },
      { x: x - 7, y: y + 15, anchor: 'end' },
    ] as const;
    const box = (choice: (typeof choices)[number]) => {
      const left = choice.anchor === 'start' ? choice.x : choice.x - width;
      return { left, right: left + width, y: choice.y };
    };
    const free = ({ left, right, y: own }: ReturnType<typeof box>) =>
      right < WIDTH &&
      !this.taken.some((other) => left < other.right && right > other.left && Math.abs(own - other.y) < 12);
    const chosen = choices.find((choice) => free(box(choice))) ?? choices[0];
    this.taken.push(box(chosen));
    return chosen;
  }
}

/** Maps [low, high], widened by a margin, to [from, to]. */
function scale(values: readonly number[], from: number, to: number) {
  const [low, high] = [Math.min(...values) / 1.15, Math.max(...values) * 1.25];
  const at = (value: number) => from + ((to - from) * Math.log(value / low)) / Math.log(high / low);
  return { at, ticks: ticks(low, high) };
}

export function renderSvg({ title, xLabel, yLabel, series }: Plot): string {
  const points = series.flatMap((one) => one.points).filter(({ x, y }) => x > 0 && y > 0);
  if (points.length === 0) throw new Error('There is nothing to plot.');
  const [right, bottom] = [WIDTH - AREA.right, HEIGHT - AREA.bottom];
  const x = scale(points.map((point) => point.x), AREA.left, right); // prettier-ignore
  const y = scale(points.map((point) => point.y), bottom, AREA.top); // prettier-ignore
  const text = (px: number, py: number, content: string, attributes = '') =>
    `<text x="${round(px)}" y="${round(py)}" ${attributes}>${escape(content)}</text>`;
  const line = (x1: number, y1: number, x2: number, y2: number) =>
    `<line x1="${round(x1)}" y1="${round(y1)}" x2="${round(x2)}" y2="${round(y2)}" stroke="#ddd"/>`;

  const labels = new Labels();
  const body: string[] = [];
  for (const tick of x.ticks)
    body.push(
      line(x.at(tick), AREA.top, x.at(tick), bottom),
      text(x.at(tick), bottom + 18, String(tick), 'text-anchor="middle"'),
    );
  for (const tick of y.ticks)
    body.push(
      line(AREA.left, y.at(tick), right, y.at(tick)),
      text(AREA.left - 8, y.at(tick) + 4, String(tick), 'text-anchor="end"'),
    );
  series.forEach(({ name, points: own, style }, index) => {
    const colour = style === 'line' ? '#888' : COLOURS[index % COLOURS.length]!;
    const shown = own.filter((point) => point.x > 0 && point.y > 0).sort((a, b) => a.x - b.x);
    const path = shown.map((point) => `${round(x.at(point.x))},${round(y.at(point.y))}`).join(' ');
    if (shown.length > 1 && style !== 'points')
      body.push(`<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="1.5"/>`);
    for (const point of style === 'line' ? [] : shown) {
      const tip = point.title === undefined ? '' : `<title>${escape(point.title)}</title>`;
      body.push(
        `<circle cx="${round(x.at(point.x))}" cy="${round(y.at(point.y))}" r="4.5" fill="${colour}">${tip}</circle>`,
      );
      if (point.label === '') continue;
      const place = labels.place(x.at(point.x), y.at(point.y), point.label);
      body.push(text(place.x, place.y, point.label, `text-anchor="${place.anchor}" fill="${colour}"`));
    }
    body.push(
      `<circle cx="${round(right - 150)}" cy="${AREA.top + 10 + 20 * index}" r="4.5" fill="${colour}"/>`,
      text(right - 140, AREA.top + 14 + 20 * index, name),
    );
  });
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${HEIGHT}" viewBox="0 0 ${WIDTH} ${HEIGHT}" ` +
      'font-family="system-ui, sans-serif" font-size="12">',
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#fff"/>`,
    text(WIDTH / 2, 30, title, 'text-anchor="middle" font-size="16"'),
    text((AREA.left + right) / 2, HEIGHT - 18, xLabel, 'text-anchor="middle"'),
    text(
      0,
      0,
      yLabel,
      `text-anchor="middle" transform="translate(22 ${(AREA.top + bottom) / 2}) rotate(-90)"`,
    ),
    ...body,
    '</svg>',
    '',
  ].join('\n');
}
