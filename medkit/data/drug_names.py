"""Drugs by generic name, brand name, and another drug that is mistaken for it."""

_DRUGS = """
acetaminophen/tylenol/warfarin albuterol/proair/metoprolol alendronate/fosamax/methotrexate
alprazolam/xanax/gabapentin amiodarone/cordarone/levothyroxine amlodipine/norvasc/sertraline
anastrozole/arimidex/prednisone apixaban/eliquis/insulin atorvastatin/lipitor/furosemide
azithromycin/zithromax/diazepam bupropion/wellbutrin/lisinopril celecoxib/celebrex/clonidine
cephalexin/keflex/digoxin ciprofloxacin/cipro/citalopram citalopram/celexa/tramadol
clonazepam/klonopin/amoxicillin clopidogrel/plavix/metformin colchicine/colcrys/zolpidem
desmopressin/ddavp/oxytocin diazepam/valium/allopurinol diclofenac/voltaren/phenytoin
diltiazem/cardizem/fluconazole donepezil/aricept/omeprazole duloxetine/cymbalta/warfarin
enoxaparin/lovenox/morphine escitalopram/lexapro/glipizide estradiol/estrace/tamoxifen
finasteride/proscar/estradiol fluoxetine/prozac/propranolol fluticasone/flonase/naltrexone
furosemide/lasix/fluoxetine gabapentin/neurontin/simvastatin glipizide/glucotrol/prednisone
hydroxychloroquine/plaquenil/loratadine ibuprofen/advil/clopidogrel itraconazole/sporanox/omeprazole
lamotrigine/lamictal/ibuprofen levofloxacin/levaquin/haloperidol levothyroxine/synthroid/amiodarone
lisinopril/zestril/alprazolam loratadine/claritin/lorazepam lorazepam/ativan/losartan losartan/cozaar/lithium
meloxicam/mobic/methadone memantine/namenda/spironolactone metformin/glucophage/ibuprofen
methylphenidate/ritalin/metoprolol metoprolol/lopressor/methylphenidate metronidazole/flagyl/metoclopramide
montelukast/singulair/risperidone naproxen/aleve/levetiracetam olanzapine/zyprexa/ondansetron
omeprazole/prilosec/warfarin pantoprazole/protonix/isotretinoin paroxetine/paxil/penicillin
phenytoin/dilantin/albuterol prednisone/deltasone/hydrochlorothiazide pregabalin/lyrica/atenolol
quetiapine/seroquel/ranitidine ranitidine/zantac/carbamazepine rosuvastatin/crestor/trazodone
sertraline/zoloft/nitroglycerin sildenafil/viagra/nitroglycerin simvastatin/zocor/codeine
sitagliptin/januvia/sumatriptan tacrolimus/prograf/azithromycin tamsulosin/flomax/tamoxifen
topiramate/topamax/methimazole tramadol/ultram/tamsulosin vancomycin/vancocin/gentamicin
warfarin/coumadin/ibuprofen zolpidem/ambien/caffeine
"""
DRUGS = [tuple(names.split("/")) for names in _DRUGS.split()]
