/** The command line. */
import { calibrate } from './calibrate';
import { demo } from './demo';
import { doctor } from './doctor';
import { estimate } from './estimate';
import { generate } from './generate';
import { inspect } from './inspect';
import { perplexity } from './perplexity';
import { runProgram } from './program';
import { sweep } from './sweep';

runProgram({
  name: 'innerkv',
  summary: 'innerkv: a low-bit KV cache with fused attention',
  commands: [doctor, estimate, inspect, demo, generate, calibrate, perplexity, sweep],
});
