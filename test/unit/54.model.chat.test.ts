/** Chat templates: what they get, what they may do, and what happens when they do more. */
import { ChatTemplate } from '../../lib/model/chat';
import { failure } from '../support/failures';

const refused = (text: string) => failure('ERR_INNERKV_INVALID_ARGUMENT', text);
const user = [{ role: 'user', content: 'Hi' }];
const render = (source: string, ...rest: Parameters<ChatTemplate['render']> extends [unknown, ...infer R] ? R : never) =>
  new ChatTemplate('model', source, { bos_token: '<s>', eos_token: '</s>' }).render(user, ...rest); // prettier-ignore

test('messages, tokens, the prompt for an answer, variables of the caller', () => {
  const source =
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}" +
    '{% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}';
  expect(render(source)).toBe('<s><user>Hi<assistant>');
  expect(render(source, { addGenerationPrompt: false })).toBe('<s><user>Hi');
  expect(render(source, { variables: { extra: '!' } })).toBe('<s><user>Hi<assistant>!');
});

test('what templates of real models use: namespaces, loops over ranges, dates, truth values of both kinds', () => {
  expect(render('{% set n = namespace(x=0) %}{% for i in range(1, 10, 3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}')).toBe('12');
  expect(render("{{ strftime_now('%Y') }}")).toMatch(/^20\d\d$/);
  expect(render('{{ true and True and not false and not False and none is none and None is none }}')).toBe('true');
  expect(render('{{ messages | tojson }}')).toBe('[{"role": "user", "content": "Hi"}]');
}); // prettier-ignore

test.each([
  ['that refuse', "{{ raise_exception('Roles must alternate') }}", 'Roles must alternate'],
  ['that are no Jinja', '{% for %}', 'refuses'],
  [
    'that never end',
    '{% for a in range(60000) %}{% for b in range(60000) %}{% endfor %}{% endfor %}',
    'timed out',
  ],
  ['that want all the memory', '{% for a in range(1000000000) %}{% endfor %}', 'a range of 1000000000'],
  ['with a range of nothing', '{{ range(0, 5, 0) }}', 'a range of'],
])('templates %s are a KvError', (_, source, text) => expect(() => render(source)).toThrow(refused(text)));

test('bad messages and monstrous templates', () => {
  const template = new ChatTemplate('model', '{{ messages[0].content }}');
  for (const messages of [undefined, 'Hi', [null], [{}], [{ content: 'x' }]])
    expect(() => template.render(messages as never)).toThrow(refused('list of objects'));
  expect(() => new ChatTemplate('model', ' '.repeat(2 ** 20 + 1))).toThrow(
    failure('ERR_INNERKV_CORRUPT', 'characters'),
  );
});
