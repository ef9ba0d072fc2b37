// deploy/kubernetes against the API's schemas, and against what the "restricted" pod security standard asks for.
import assert from 'node:assert/strict';
import {readFileSync} from 'node:fs';
import {test} from 'node:test';
import * as yaml from 'js-yaml';

const folder = new URL('../../deploy/kubernetes/', import.meta.url);
const documents = yaml.load(readFileSync(new URL('kustomization.yaml', folder), 'utf8'))
  .resources.flatMap((file) => yaml.loadAll(readFileSync(new URL(file, folder), 'utf8')));
const pods = documents.filter((document) => document.spec.template).map((document) => document.spec.template.spec);

async function validate(document) {
  const {apiVersion, kind} = document;
  const models = await import(`kubernetes-models/${apiVersion}/${kind}`);
  new models[kind](document).validate();
}

for (const document of documents)
  test(`${document.kind} ${document.metadata.name} is as the schema says`, () => validate(document));

test('a wrong field is found', async () => {
  const wrong = structuredClone(documents.find((document) => document.kind === 'StatefulSet'));
  wrong.spec.replicas = 'two';
  await assert.rejects(validate(wrong), /replicas/);
});

test('pods pass the restricted standard', () => {
  assert.equal(pods.length, 2);
  for (const pod of pods) {
    assert.equal(pod.securityContext.runAsNonRoot, true);
    assert.equal(pod.securityContext.seccompProfile.type, 'RuntimeDefault');
    for (const {securityContext} of pod.containers) {
      assert.equal(securityContext.allowPrivilegeEscalation, false);
      assert.deepEqual(securityContext.capabilities, {drop: ['ALL']});
    }
    for (const volume of pod.volumes) assert.ok(volume.secret || volume.emptyDir, JSON.stringify(volume));
  }
});

test('a backend may use what it offers and 256 MiB more', () => {
  const [{env, resources}] = pods.find((pod) => pod.containers[0].name === 'backend').containers;
  const offered = Number(env.find(({name}) => name === 'APP_MEM').value);
  assert.equal(resources.limits.memory, `${offered + 256}Mi`);
});
